"""Runs many sessions' steps as batches on a device: scheduler, runner, graphs, capacity, speed."""
