"""Fine-tuning on packed weights: training data, LoRA adapters, paged optimizers and the memory plan (needs torch)."""
