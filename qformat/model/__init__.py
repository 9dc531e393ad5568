"""Running models on packed weights: layers, building, mapping, transformers and PEFT."""
