"""A client's forward and backward through the blocks of a swarm."""
