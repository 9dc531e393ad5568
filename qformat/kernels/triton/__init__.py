"""Triton kernels: for each kernel, one file with the device code and one that launches it."""
