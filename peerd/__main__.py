"""`python -m peerd`: the same as the `peerd` command."""

from peerd.cli.main import main

main()
