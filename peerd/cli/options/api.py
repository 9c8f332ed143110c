"""The options of a daemon's local API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from peerd.cli.options.parsing import parse_host_name, parse_host_port, parse_named_model, parse_origin
from peerd.cli.options.rules import ApiOptions
from peerd.cli.options.shared import Command, draft_device_option, remote_head_option

if TYPE_CHECKING:
    from peerd.cli.daemon import Offered

_OPTIONS = (
    click.option(
        "--draft",
        "drafts",
        type=parse_named_model,
        multiple=True,
        metavar="[NAME=]MODEL",
        help="Let this small model guess tokens for the model that the local API offers as NAME, where that is faster;"
        " it must have the same tokenizer, or be a head that peerd train-draft made. It is fetched and run whole on"
        " this machine. Answers are the same. Repeat it for several.",
    ),
    draft_device_option,
    remote_head_option,
    click.option(
        "--client",
        is_flag=True,
        help="Stay in the swarm for the programs on this machine, which ask through the local API.",
    ),
    click.option(
        "--socket",
        "socket_path",
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="Offer the local API on this unix socket. Default with --client: $XDG_RUNTIME_DIR/peerd.sock, else"
        " /tmp/peerd-UID/peerd.sock.",
    ),
    click.option(
        "--http",
        type=parse_host_port,
        metavar="HOST:PORT",
        help="Offer the local API on a TCP port too. Requests need the token.",
    ),
    click.option(
        "--token-file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="The file with the token of --http; created if it is missing. Default: in the state directory.",
    ),
    click.option("--no-token", is_flag=True, help="Need no token: any program on this machine may use --http."),
    click.option(
        "--allow-host",
        "names",
        type=parse_host_name,
        multiple=True,
        metavar="NAME",
        help="Another name by which programs may call --http, such as host.docker.internal. Repeat it for several.",
    ),
    click.option(
        "--allow-origin",
        "origins",
        type=parse_origin,
        multiple=True,
        metavar="ORIGIN",
        help="Let web pages of this origin, such as http://localhost:3000, use --http; they need the token too. Repeat"
        " it for several.",
    ),
    click.option(
        "--keep-sessions",
        "keep_positions",
        type=click.IntRange(min=0),
        default=16384,
        show_default=True,
        metavar="TOKENS",
        help="Keep the servers' KV of answers, of so many tokens in all, for five minutes: a chat's next turn then"
        " computes only what is new. 0: keep none.",
    ),
    click.option(
        "--traces",
        is_flag=True,
        help="Send a trace of each answer, with a span for each hop, to where OTEL_EXPORTER_OTLP_ENDPOINT says. It"
        " holds nothing of what was said. Needs peerd[traces].",
    ),
    click.option(
        "--open",
        "open_page",
        is_flag=True,
        help="Print the link to this daemon's page, a chat and a view of the swarm, and open it in a browser. Without"
        " --http, at a free port of 127.0.0.1.",
    ),
)


def api_options(command: Command) -> Command:
    """Add the options of the local API to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def offered(api: ApiOptions, models: tuple[tuple[str | None, Path | str], ...]) -> Offered:
    """What the local API offers, and where."""
    from peerd.cli.daemon import Offered
    from peerd.local.profile import default_token_file
    from peerd.local.socket_path import default_socket_path

    token_file = api.token_file
    if api.http is not None and not api.no_token and token_file is None:
        token_file = default_token_file()
    socket_path = api.socket_path or default_socket_path()
    return Offered(
        models,
        socket_path,
        api.http,
        token_file,
        api.open_page,
        api.names,
        api.origins,
        api.keep_positions,
        api.drafts,
        api.draft_device or "cpu",
        api.traces,
        api.remote_head,
    )
