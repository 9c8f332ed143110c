"""A decoder with its ends taken off, and the head."""
