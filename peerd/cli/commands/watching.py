"""`peerd status`, `peerd peers` and `peerd top`: what the daemon on this machine says, through its socket."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from peerd.cli.commands.running import EXIT_CODES, run_once
from peerd.cli.options.shared import socket_option


@click.command(epilog=EXIT_CODES)
@socket_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def status(ctx: click.Context, /, socket_path: Path | None, as_json: bool) -> None:
    """Show the status of the daemon on this machine: peers, blocks, and whether its models' blocks have servers."""
    from peerd.cli.watching.status import show_status

    run_once(ctx, partial(show_status, socket_path, as_json=as_json), verbose=False)


@click.command(epilog=EXIT_CODES)
@socket_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with whole PeerIds and all figures.")
@click.pass_context
def peers(ctx: click.Context, /, socket_path: Path | None, as_json: bool) -> None:
    """Show who is in the swarm, as the daemon on this machine sees it.

    Lists the servers of the daemon's models with their blocks, speed and free KV memory, and the other peers that are
    connected, with the delay to each.
    """
    from peerd.cli.watching.peers import show_peers

    run_once(ctx, partial(show_peers, socket_path, as_json=as_json), verbose=False)


@click.command(epilog=EXIT_CODES)
@socket_option
@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(min=0.5),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to draw.",
)
@click.pass_context
def top(ctx: click.Context, /, socket_path: Path | None, every_s: float) -> None:
    """Watch the swarm, as the daemon on this machine sees it, until Ctrl-C.

    Shows how many servers each block has, and the servers with their blocks, speed, free KV memory, delay, whether they
    are reached directly, and since when they are seen. Without a terminal it prints this once.
    """
    from peerd.cli.watching.top import show_top

    run_once(ctx, partial(show_top, socket_path, every_s=every_s), verbose=False)
