"""The table of architectures, and building them without values."""
