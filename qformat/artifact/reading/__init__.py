"""Opening and checking what is on the disk: structure, digests, mapped tensors."""
