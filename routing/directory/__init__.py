"""What the swarm serves: announcements published and looked up."""
