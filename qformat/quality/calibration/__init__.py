"""Codes and scales chosen on a text, layer by layer."""
