"""Runs blocks on a device: checkpoints, spans, KV pages and the engine. Without network code."""
