"""Measures how close an artifact is to its source, and improves it without changing its size."""
