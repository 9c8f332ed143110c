"""Who serves which blocks, how near, and who is next."""
