"""What peers say to each other on each stream."""
