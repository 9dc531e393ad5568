"""Fetching, publishing, verifying and comparing artifacts on the Hugging Face Hub."""
