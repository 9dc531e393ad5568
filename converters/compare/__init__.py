"""An artifact beside the checkpoint that it was made from."""
