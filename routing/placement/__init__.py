"""Which blocks a server should host."""
