"""The codec on CPUs: numba kernels, vector instructions, and products and sums computed directly from packed codes."""
