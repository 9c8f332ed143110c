"""Invitations: the link with which one user lets another machine into a swarm, and what that machine makes of it."""
