"""Signed records: the envelope and the bodies in it."""
