"""The `peerd` command: options, signals, the demonstration, key files."""
