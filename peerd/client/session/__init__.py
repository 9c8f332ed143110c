"""One session's chain of hops: opened, and repaired while hops die."""
