"""What travels between peers: bytes in, events out. Knows no sockets, no trio, no clock."""
