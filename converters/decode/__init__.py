"""Converts an artifact to a plain checkpoint: plan, execute, seal."""
