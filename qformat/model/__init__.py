"""Run models on packed weights: layers, model building, memory mapping, transformers and PEFT."""
