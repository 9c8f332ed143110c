"""Yields to the machine's owner: serves while nobody else uses the machine (`--idle-only`)."""
