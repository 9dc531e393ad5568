"""Which tensors are quantized: the default table of names, and recipes that override it."""
