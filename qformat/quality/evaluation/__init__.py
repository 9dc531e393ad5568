"""Measures how close artifacts are to their 16-bit model, token by token."""
