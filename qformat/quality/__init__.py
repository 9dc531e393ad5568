"""How good an artifact is beside its source, and how it gets better within the same bytes."""
