"""Checkpoints in FP8 and MXFP4, decoded while they are read."""
