"""LoRA adapters: on a packed layer, on disk, and the record of the base that they belong to."""
