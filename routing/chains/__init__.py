"""Plans chains: which peers, in which order, cover the blocks that a client needs."""
