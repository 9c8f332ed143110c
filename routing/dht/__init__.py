"""The DHT: Kademlia over authenticated streams, and its store."""
