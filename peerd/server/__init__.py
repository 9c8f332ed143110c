"""Serves other peers: their sessions, their training lanes, the engine's task, and quotas."""
