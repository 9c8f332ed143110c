"""Publishes announcements and looks up what the swarm serves."""
