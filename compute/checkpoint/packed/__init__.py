"""Weights as publishers quantize them, read as plain numbers."""
