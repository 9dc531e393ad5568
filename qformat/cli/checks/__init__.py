"""What the commands check beside their own work: files, signatures, names and shapes of tensors."""
