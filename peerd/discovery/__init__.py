"""Finding others and being found: the DHT over our connections."""
