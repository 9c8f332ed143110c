"""The configuration of a daemon from a file and the environment, beside its options."""
