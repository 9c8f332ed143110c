"""Forward and backward through the blocks of a swarm."""
