"""One GGUF file as a checkpoint."""
