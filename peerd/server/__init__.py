"""Serving others: sessions, training lanes, the engine's task, quotas."""
