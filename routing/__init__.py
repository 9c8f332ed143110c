"""Which peers exist and which to use: the DHT, the directory, chains and placement."""
