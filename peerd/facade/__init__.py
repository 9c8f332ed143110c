"""A Transformers model whose decoder layers run on a swarm, for programs that know nothing of Trio."""
