"""Fine-tuning: data, paged optimizer states, and the trainer between them (torch)."""
