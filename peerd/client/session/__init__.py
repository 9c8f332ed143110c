"""One chain of hops, kept whole while hops die."""
