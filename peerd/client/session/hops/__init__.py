"""The streams from a client to the hops of its chain."""
