"""`peerd invite` and `peerd join`: their options."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from peerd.cli.commands.running import EXIT_CODES, run_once
from peerd.cli.commands.starting import log_as_asked, start_daemon
from peerd.cli.help import write_options
from peerd.cli.invitations.joining import FROM_LINK, fill_in, key_of, read_link
from peerd.cli.options.daemon import daemon_options
from peerd.cli.options.shared import (
    bootstrap_option,
    joining,
    log_format_option,
    socket_option,
    swarm_key_option,
    verbose_option,
)
from peerd.protocol.addresses import Multiaddr


@click.command(epilog=EXIT_CODES)
@click.argument("model", required=False, metavar="[MODEL]")
@socket_option
@bootstrap_option
@swarm_key_option
@click.option(
    "--with-key",
    is_flag=True,
    help="Put the key of --swarm-key into the link, so that it alone is enough. Such a link is a secret.",
)
@click.option("--qr/--no-qr", "shows_qr", default=None, help="Show a QR code. Default: on a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def invite(
    ctx: click.Context,
    /,
    model: str | None,
    socket_path: Path | None,
    bootstrap: tuple[Multiaddr, ...],
    swarm_key: Path | None,
    with_key: bool,
    shows_qr: bool | None,
    as_json: bool,
) -> None:
    """Print a link with which another machine joins this swarm.

    It holds addresses of peers, the name of a model and, of a private swarm, which key is needed. The daemon on this
    machine knows them: MODEL is one of its models, by default the first. With --bootstrap no daemon is asked; MODEL is
    then a name on the hub.
    """
    from peerd.cli.invitations.inviting import Inviting
    from peerd.cli.invitations.inviting import invite as print_invitation

    asked = Inviting(
        model=model,
        socket_path=socket_path,
        bootstrap=bootstrap,
        names_peers=ctx.get_parameter_source("bootstrap") is ParameterSource.COMMANDLINE,
        key_file=swarm_key,
        with_key=with_key,
        shows_qr=shows_qr,
        as_json=as_json,
    )
    run_once(ctx, partial(print_invitation, asked), verbose=False)


class _Join(click.Command):
    """A daemon without the options that the link stands for."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_options(self, ctx, formatter)


@click.command(cls=_Join, epilog=EXIT_CODES)
@click.argument("link", metavar="LINK")
@daemon_options
@verbose_option
@log_format_option
@click.pass_context
def join(ctx: click.Context, /, link: str, **options: Any) -> None:
    """Join the swarm of an invitation, as a daemon.

    LINK is what peerd invite printed on another machine; - reads it from standard input, where the other users of this
    machine do not see it. Without more options this offers the link's model to the programs on this machine, and opens
    a page to talk to it; with --serve-blocks auto it runs some of its blocks for others.
    """
    log_as_asked(options)
    invitation = read_link(sys.stdin.read() if link == "-" else link)
    fill_in(options, invitation)
    swarm = joining(options)
    names_key = ctx.get_parameter_source("swarm_key") is ParameterSource.COMMANDLINE
    key = key_of(invitation, swarm.swarm_key, names_key=names_key)
    start_daemon(ctx, replace(swarm, swarm_key=key), options)


join.params = [param for param in join.params if param.name not in FROM_LINK]
