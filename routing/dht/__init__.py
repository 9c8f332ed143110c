"""The DHT: Kademlia over authenticated streams, and the store of records."""
