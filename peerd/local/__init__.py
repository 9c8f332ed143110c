"""What programs on this machine say to a daemon on its socket, and a client of it in Python (spec/local-api.md)."""
