"""Commands that make artifacts and checkpoints."""
