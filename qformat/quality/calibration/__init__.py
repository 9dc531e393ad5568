"""Chooses codes and scales on a text, layer by layer."""
