"""Reads rows of training data from files, one at a time."""
