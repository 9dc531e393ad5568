"""GGUF files of llama.cpp as a source."""
