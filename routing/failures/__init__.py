"""Which peers failed, how slow they are, and who is suspected."""
