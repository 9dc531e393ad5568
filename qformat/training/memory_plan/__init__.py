"""The memory of a training, worked out before anything is loaded."""
