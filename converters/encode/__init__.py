"""Converts a source to an artifact: plan, execute, seal."""
