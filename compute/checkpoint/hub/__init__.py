"""The model hub: its HTTP, the cache, the disk ledger."""
