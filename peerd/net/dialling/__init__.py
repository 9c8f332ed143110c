"""Finding a way to a peer: its addresses, and circuits through relays."""
