"""The messages that peers send each other on each kind of stream."""
