"""Commands that run a model or describe this installation."""
