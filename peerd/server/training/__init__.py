"""Trains for other peers: passes through our blocks, and copies of them that clients change."""
