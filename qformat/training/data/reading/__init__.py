"""Rows of training data out of files, one at a time."""
