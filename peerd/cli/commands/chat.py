"""`peerd chat`: its options."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from peerd.cli.commands.running import EXIT_CODES, run
from peerd.cli.console import working
from peerd.cli.options.shared import (
    disk_option,
    join_options,
    joining,
    revision_option,
    socket_option,
    verbose_option,
)
from peerd.cli.watching.logs import set_up_logging

_JOINS = ("bootstrap", "swarm_key", "allowed", "blocked", "trusted", "manifests", "no_relay", "no_punch")


@click.command(epilog=EXIT_CODES)
@click.argument("model", required=False, metavar="[MODEL]")
@revision_option
@disk_option
@socket_option
@click.option("--system", default="", metavar="TEXT", help="The system prompt.")
@click.option("--no-history", is_flag=True, help="Neither read nor keep what you type, for the arrow keys.")
@join_options
@verbose_option
@click.pass_context
def chat(
    ctx: click.Context,
    /,
    model: str | None,
    revision: str | None,
    disk_bytes: int | None,
    socket_path: Path | None,
    system: str,
    no_history: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Talk to a model.

    Through the daemon on this machine if one offers MODEL (without MODEL: its first one); otherwise through a peer of
    its own, which needs --bootstrap. An option that names a swarm or its peers always means a peer of its own.

    Enter sends, Esc and Enter begin a new line, Ctrl-C stops an answer, and twice leaves; /help lists commands. Without
    a terminal each line of standard input is a message, and only answers go to standard output.
    """
    names_swarm = any(ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in _JOINS)
    swarm = joining(options)
    set_up_logging(logging.DEBUG if verbose else logging.WARNING)
    with working("starting"):
        from peerd.cli.chat.opening import Asked, run_chat

    asked = Asked(
        model=model,
        revision=revision,
        joining=swarm,
        socket_path=socket_path,
        disk_bytes=disk_bytes,
        wants_own=names_swarm,
        system=system,
        keeps_history=not no_history,
    )
    run(ctx, partial(run_chat, asked))
