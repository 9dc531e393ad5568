"""The Triton kernels, a file for the device code and one for its launch."""
