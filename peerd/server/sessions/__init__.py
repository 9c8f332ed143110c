"""Sessions of clients at one hop: which there are, what feeds them, and where their results go."""
