"""For tests of applications: a network in memory, a fake engine, hostile peers."""
