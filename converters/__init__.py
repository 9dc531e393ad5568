"""Converts checkpoints to artifacts and back: source, plan, execute, seal. Only the command line imports it."""
