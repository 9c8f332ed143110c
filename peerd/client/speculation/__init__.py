"""Speculative decoding: guess several tokens, and have the swarm check them in one step."""
