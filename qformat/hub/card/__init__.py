"""Model card of a published artifact, and the facts that it is made from."""
