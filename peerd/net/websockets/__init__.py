"""Carries connections in websockets."""
