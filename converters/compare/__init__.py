"""Compares an artifact with its source checkpoint."""
