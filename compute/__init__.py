"""Blocks on a device: checkpoints, spans, KV pages and the engine. Knows no network."""
