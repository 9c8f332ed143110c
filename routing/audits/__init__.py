"""Decides which of several servers computed something else, from comparisons between them."""
