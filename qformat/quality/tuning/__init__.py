"""Better scales and norms for given codes, by the predictions of the 16-bit model."""
