"""A Transformers model whose decoder layers run on a swarm, for programs without Trio."""
