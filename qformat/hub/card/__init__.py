"""The model card of a published artifact, and the facts it is made from."""
