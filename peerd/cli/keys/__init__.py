"""Files with keys: a peer's own, and a private swarm's."""
