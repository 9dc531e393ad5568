"""Which parts of a model lie where, and how they get there: placement, shards on a device, layers in host memory."""
