"""Which blocks this peer hosts: chosen, loaded, announced, moved."""
