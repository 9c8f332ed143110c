"""`peerd doctor`: its options."""

from __future__ import annotations

from pathlib import Path

import click

from peerd.cli.commands.running import EXIT_CODES, run_once
from peerd.cli.console import working
from peerd.cli.options.parsing import parse_address, parse_model
from peerd.cli.options.shared import bootstrap_option, no_relay_option, socket_option, swarm_key_option, verbose_option
from peerd.local.profile import default_identity, default_token_file
from peerd.local.socket_path import default_socket_path
from peerd.protocol.addresses import Multiaddr


@click.command(epilog=EXIT_CODES)
@bootstrap_option
@swarm_key_option
@no_relay_option
@click.option(
    "--listen",
    type=parse_address,
    multiple=True,
    metavar="MULTIADDR",
    help="Where the daemon is to listen: whether others can dial this machine is tried there. Default: any free port.",
)
@click.option(
    "--identity",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The daemon's key. Default: where a daemon keeps it.",
)
@click.option(
    "--model",
    type=parse_model,
    metavar="MODEL",
    help="Say how many blocks of this model fit here; peerd blocks MODEL says more.",
)
@socket_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@verbose_option
@click.pass_context
def doctor(
    ctx: click.Context,
    /,
    bootstrap: tuple[Multiaddr, ...],
    swarm_key: Path | None,
    no_relay: bool,
    listen: tuple[Multiaddr, ...],
    identity: Path | None,
    model: Path | str | None,
    socket_path: Path | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Say what is wrong with this machine, its peer and its swarm, and how to mend it.

    Looks at files, disk, memory, packages, devices and the model hub; with --bootstrap it asks those peers too: what
    time it is, how far away they are, and whether they can dial this machine. It takes up to a minute and changes
    nothing. The exit code is 1 if anything is an error.
    """
    with working("starting"):
        from peerd.cli.doctor.doctor import Doctor, Question
        from peerd.cli.keys.swarm_key import read_swarm_key
        from peerd.peer import DEFAULT_LISTEN

    question = Question(
        identity=identity or default_identity(),
        socket_path=socket_path or default_socket_path(),
        token_file=default_token_file(),
        bootstrap=bootstrap,
        listen=listen or (DEFAULT_LISTEN,),
        swarm_key=read_swarm_key(swarm_key) if swarm_key is not None else None,
        may_be_relayed=not no_relay,
        model=model,
    )
    asked = Doctor(question, as_json=as_json)
    run_once(ctx, asked.run, verbose=verbose)
    ctx.exit(asked.exit_code)
