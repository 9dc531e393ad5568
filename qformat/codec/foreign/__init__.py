"""Decoders of the block formats of other programs: ggml (GGUF), FP8 and MXFP4."""
