"""Remembers which peers failed, how slow they are, and which are suspected."""
