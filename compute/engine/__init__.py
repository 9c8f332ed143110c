"""From sessions to batches to the device: scheduler, runner, graphs, capacity, speed."""
