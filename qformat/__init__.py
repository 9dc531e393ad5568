"""qformat: small, verifiable 4-bit artifacts from 16-bit model checkpoints."""

__version__ = "0.1.0"
