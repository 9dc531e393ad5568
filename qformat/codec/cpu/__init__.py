"""The codec on CPUs: numba kernels, vector instructions, products and sums straight from the codes."""
