"""Reading repositories of the Hub: requests with retries, pinned revisions, byte ranges, the local cache."""
