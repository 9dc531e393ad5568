"""From an artifact to a repository of the Hub: verify, prepare, upload in one commit."""
