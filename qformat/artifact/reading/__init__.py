"""Opening and checking artifacts on disk: structure, digests and mapped tensors."""
