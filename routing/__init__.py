"""Who is out there, and which way to go: the DHT, chains and placement."""
