"""The commands beside the daemon: their options, and how they are run."""
