"""The Hub: artifacts fetched, published, verified and compared where they are."""
