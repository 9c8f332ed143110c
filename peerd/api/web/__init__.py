"""The page at `/`: a chat and a view of the swarm, for people with a browser."""
