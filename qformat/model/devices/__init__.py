"""Place the parts of a model on devices: decide the placement, copy shards to a device, stream layers from host memory.

A model that fits on the GPU is read shard by shard through a ring of pinned buffers (`shard_stream`):

    files on disk        host memory                                GPU memory

    shard 1  ┐ read by   ring of buffers (16 MiB each)   copied     one allocation per shard
    shard 2  ├─────────► [ 0 ][ 1 ][ 2 ][ 3 ] ─────────────────────► [ shard 1 ][ shard 2 ][ shard 3 ]
    shard 3  ┘ threads     ▲ a buffer returns to the   in order
                           └ readers with its copy pending

If the model does not fit, some layers stay in pinned host memory and pass through two slots (`layer_stream`):

    host memory (pinned)                            GPU memory

    ┌─────────┐                                     embeddings, norms, head, adapters   always there
    │ layer 0 │ ──┐                                 layers that fit                     always there
    │ layer 3 │ ──┼── copied in turn ─────────────► [ slot 0: layer 6 ]  being copied
    │ layer 6 │ ──┘                                 [ slot 1: layer 3 ]  runs meanwhile
    └─────────┘

`placement` decides which layers these are from headers alone. `host_layers` checks the memory and attaches the tensors.
"""
