"""Judges whether other peers can dial us, from what they report."""
