"""A peer that serves or uses a language model split over a swarm."""
