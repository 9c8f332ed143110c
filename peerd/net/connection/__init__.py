"""One live connection: streams, the agreement to use it, and its end."""
