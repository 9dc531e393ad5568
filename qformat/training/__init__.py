"""Fine-tuning: the data that is trained on, the optimizer and the entry point."""
