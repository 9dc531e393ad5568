"""Plans the device memory of a training before anything is loaded."""
