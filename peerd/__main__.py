"""Runs the `peerd` command as `python -m peerd`."""

from peerd.cli.main import main

main()
