"""From checkpoints to artifacts: source, plan, execute, seal. An edge of the library: nothing in `qformat` needs it."""
