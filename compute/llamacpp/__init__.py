"""Runs blocks of GGUF files with llama.cpp's own arithmetic, as a second engine beside ours over torch."""
