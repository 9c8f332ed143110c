"""Decides which blocks a server should host."""
