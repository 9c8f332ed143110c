"""`peerd receipts`: what clients acknowledged that a daemon's server computed for them."""

from __future__ import annotations

from pathlib import Path

import click

from peerd.local.profile import default_identity


@click.command()
@click.option(
    "--identity",
    "identity_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The daemon's key file, beside which its state is. Default: that of a daemon without --identity.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with each client's last signed receipt.")
def receipts(identity_file: Path | None, as_json: bool) -> None:
    """Show how many positions clients acknowledged, by day, model and client.

    Clients sign that this server computed so many positions for them. Reads what the daemon on this machine has saved,
    at most a minute ago, whether it runs or not.
    """
    from peerd.cli.daemon import state_dir
    from peerd.cli.watching.receipts import show_receipts

    show_receipts(state_dir(identity_file or default_identity()), as_json=as_json)
