"""Checks finished answers: other servers compute them again, and servers that computed something else are found."""
