"""Names of tensors with the parts that wrappers of a model put there, and without them."""
