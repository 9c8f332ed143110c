"""HTTP/1.1 for the local API: connections with deadlines, and a bound on how many there are."""
