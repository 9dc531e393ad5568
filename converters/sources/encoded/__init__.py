"""Checkpoints in the encodings of other programs, decoded while they are read: FP8 and MXFP4 blocks."""
