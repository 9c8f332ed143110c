"""A model of a swarm as an application uses it: text in, tokens out."""
