"""Adapters that PEFT attaches to a loaded model: refuse what does not work on packed layers."""
