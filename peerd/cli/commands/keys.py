"""`peerd keys`: makes and shows keys."""

from __future__ import annotations

from pathlib import Path

import click

from peerd.cli.console import say
from peerd.local.profile import state_folder


@click.group()
def keys() -> None:
    """Make keys, and say whose they are."""


@keys.command("new-swarm")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE")
def new_swarm(path: Path) -> None:
    """Write the key of a new private swarm to FILE.

    Give it to all peers of the swarm, as --swarm-key FILE, and to nobody else: strangers then learn neither who
    the peers are nor what they serve.
    """
    from peerd.cli.keys.swarm_key import create_swarm_key

    create_swarm_key(path)
    say(f"{path} holds the key of a new swarm: give it to its peers, each as --swarm-key FILE")


@keys.command("show")
@click.argument("paths", nargs=-1, type=click.Path(dir_okay=False, path_type=Path), metavar="[FILE]...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(paths: tuple[Path, ...], as_json: bool) -> None:
    """Print the PeerId of each key FILE, and whether a daemon uses it now.

    Without FILE: of the keys that peerd itself has made in its state directory. It prints no secret, and changes
    nothing. Give the PeerId to others for --allow, --block, --trusted or --trainable.
    """
    from peerd.cli.doctor.show_keys import show_keys

    show_keys(paths or tuple(sorted(state_folder().glob("*.key"))), as_json=as_json)
