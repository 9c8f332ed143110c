"""What a running daemon says of itself: its log, its status, its swarm."""
