"""LoRA adapters: the layer, loading and saving, and the record of the base model."""
