"""Trains scales and norms for fixed codes on the predictions of the 16-bit model."""
