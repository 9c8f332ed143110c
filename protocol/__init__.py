"""What travels between peers: bytes in, events out. Without sockets, trio or a clock: time is an argument."""
