"""The model: a span of a decoder's blocks, and the head."""
