"""Fine-tuning: paged optimizer states and what surrounds them (torch)."""
