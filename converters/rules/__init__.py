"""Which tensors are quantized: the table of names, and what a recipe changes."""
