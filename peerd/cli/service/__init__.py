"""`peerd service`: a daemon that systemd starts for a user, and starts again."""
