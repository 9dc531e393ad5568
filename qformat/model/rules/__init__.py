"""The rules of transformers for the tensors of a checkpoint, and how a checkpoint fits them."""
