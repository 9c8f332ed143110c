"""Compares what different servers computed of the same blocks, and measures how far honest ones lie apart."""
