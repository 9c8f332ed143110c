"""What `peerd train-draft` and `peerd train-span` do."""
