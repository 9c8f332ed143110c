"""What was trained beside remote blocks: saved, described, put on a hub, and read again."""
