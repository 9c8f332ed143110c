"""The options of a daemon, and which of them may be used together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import platformdirs

from peerd.cli.console import working
from peerd.cli.options import DTYPES, QUANTIZATIONS, Command, Joining, disk_option, join_options, revision_option
from peerd.cli.parsing import (
    at_revision,
    is_loopback,
    parse_adapter,
    parse_address,
    parse_blocks,
    parse_device,
    parse_host_port,
    parse_limit,
    parse_memory,
    parse_named_model,
)
from peerd.cli.relay_options import relay_options, relaying
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.span import Span

if TYPE_CHECKING:
    from peerd.cli.daemon import Daemon, Offered
    from peerd.spans.spec import ServeSpec


_OPTIONS = (
    click.option(
        "--serve-blocks",
        type=parse_blocks,
        metavar="A:B|N|auto",
        help="Serve blocks A to B-1 of --model; or N blocks; or all that fit into free memory. Without A:B the swarm"
        " decides which, now and later: see --no-move.",
    ),
    click.option(
        "--no-move",
        "stay",
        is_flag=True,
        help="With --serve-blocks N or auto: keep the blocks that were chosen at the start. Otherwise the server"
        " moves, its sessions ended first, where other blocks lack servers much more.",
    ),
    click.option(
        "--look-every",
        "look_every_s",
        type=click.FloatRange(min=1),
        metavar="SECONDS",
        help="With --serve-blocks N or auto: look so often whether to move. Default: 300, give or take half of it.",
    ),
    click.option(
        "--model",
        "models",
        type=parse_named_model,
        multiple=True,
        metavar="[NAME=]MODEL",
        help="A model's directory, a .gguf file, or org/name[@revision] on the hub: the one to serve, or one that"
        " the local API offers as NAME. Repeat it for several.",
    ),
    click.option(
        "--models",
        "among",
        multiple=True,
        metavar="PATTERN",
        help="Instead of --model, with --serve-blocks N or auto: serve whichever model needs it most, of those that the"
        " swarm serves and that a pattern allows: org/name on the hub, where * and ? stand for anything, or paths of"
        " models on this machine. Repeat it for several.",
    ),
    revision_option,
    disk_option,
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
        help="Offer the local API on a TCP port too, to whoever has the token.",
    ),
    click.option(
        "--token-file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Where the token of --http lies; made if it is not there. Default: in the state directory.",
    ),
    click.option("--no-token", is_flag=True, help="Ask for no token: any program on this machine may use --http."),
    click.option(
        "--open",
        "open_page",
        is_flag=True,
        help="Print the link to this daemon's page, a chat and a view of the swarm, and open it in a browser. Without"
        " --http, at a free port of 127.0.0.1.",
    ),
    join_options,
    click.option(
        "--listen",
        type=parse_address,
        multiple=True,
        metavar="MULTIADDR",
        help="Where to listen. Default for a server: /ip4/0.0.0.0/tcp/0/ws, any free port.",
    ),
    click.option(
        "--announce",
        type=parse_address,
        multiple=True,
        metavar="MULTIADDR",
        help="Announced instead of the listen addresses, for forwarded ports and proxies.",
    ),
    click.option(
        "--identity",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="The key that this peer is; made if it is not there. Each daemon needs its own. What the peer keeps across"
        " restarts lies beside it.",
    ),
    click.option("--dtype", type=click.Choice(DTYPES), help="What to compute in. Default: the checkpoint's."),
    click.option(
        "--device",
        "devices",
        type=parse_device,
        multiple=True,
        metavar="DEVICE",
        help="cpu, cuda (the first GPU), cuda:N, or cuda:all. Repeat it for several: each runs a part of the"
        " blocks, as its memory allows. Default: cpu.",
    ),
    click.option(
        "--kv-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        help="Positions to keep KV for, of all sessions.",
    ),
    click.option(
        "--memory",
        "memory_bytes",
        type=parse_memory,
        metavar="SIZE",
        help="What serving may take beyond the program itself, on each device, such as 6GiB. Default: what is free.",
    ),
    click.option(
        "--quantize",
        type=click.Choice(QUANTIZATIONS),
        help="How weights are stored: int8 in half of what bfloat16 takes, nf4 in a little more than a quarter."
        " Default: none, which is most exact.",
    ),
    click.option(
        "--throughput",
        type=click.FloatRange(min=0, min_open=True),
        metavar="RATE",
        help="Announce this speed, in positions a second through one block, instead of measuring it once.",
    ),
    click.option(
        "--adapter",
        "adapters",
        type=parse_adapter,
        multiple=True,
        metavar="NAME=DIR",
        help="Serve a LoRA adapter too, as peft saved it, for the sessions that ask for NAME: a directory, or org/name"
        " on the hub, whose NAME may be left out. Repeat it for several.",
    ),
    click.option(
        "--client-adapters",
        "client_adapter_bytes",
        type=parse_limit,
        metavar="SIZE",
        help="How large an adapter clients may bring, each for its own session; 0: none. Default: 64MB, or a 64th"
        " of the memory.",
    ),
    click.option(
        "--uplink",
        type=parse_memory,
        metavar="SIZE",
        help="Announce that this machine can send so much in a second, such as 2.5MB for 20 Mbit/s: long prompts and"
        " training then go by faster lines where there are any. Default: what its connections show.",
    ),
    relay_options,
    click.option("--stop-on-eof", is_flag=True, help="Stop when standard input ends: for programs that start peers."),
)


def daemon_options(command: Command) -> Command:
    """Add all options of a daemon to a command; `daemon_of` reads them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def daemon_of(
    swarm: Joining,
    *,
    serve_blocks: Span | int | str | None,
    models: tuple[tuple[str | None, Path | str], ...],
    revision: str | None,
    disk_bytes: int | None,
    client: bool,
    socket_path: Path | None,
    http: tuple[str, int] | None,
    token_file: Path | None,
    no_token: bool,
    open_page: bool,
    listen: tuple[Multiaddr, ...],
    announce: tuple[Multiaddr, ...],
    identity: Path | None,
    stop_on_eof: bool,
    devices: tuple[str, ...],
    quantize: str | None,
    **serving: Any,
) -> Daemon:
    """The configuration that the options describe. Raises click.UsageError if they contradict each other."""
    relay = relaying(serving)
    if open_page and http is None:
        http = ("127.0.0.1", 0)
    offers = client or socket_path is not None or http is not None
    among: tuple[str, ...] = serving["among"]
    if among and (models or serve_blocks is None or isinstance(serve_blocks, Span)):
        raise click.UsageError("--models lets the swarm decide: say --serve-blocks auto or N with it, and no --model")
    if serve_blocks is not None and len(models) != 1 and not among:
        raise click.UsageError("--serve-blocks says which blocks, --model of which one model: say each once")
    if revision and among:
        raise click.UsageError("--revision is for --model: of --models, the swarm says which commit it serves")
    if (revision or disk_bytes) and not (models or among):
        raise click.UsageError("--revision and --disk are for models: add --model")
    if revision and len(models) > 1:
        raise click.UsageError("--revision is for one --model; with several, write each as org/name@revision")
    models = tuple((name, at_revision(model, revision)) for name, model in models)
    if models and serve_blocks is None and not offers:
        raise click.UsageError("--model is for --serve-blocks, or for the local API: add --client, --socket or --http")
    if serve_blocks is None and any([devices, quantize, *serving.values()]):
        raise click.UsageError(
            "--dtype, --device, --kv-tokens, --memory, --quantize, --throughput, --adapter, --client-adapters,"
            " --uplink, --look-every and --no-move say how to serve: add --serve-blocks"
        )
    if serve_blocks is None and not (offers or listen):
        raise click.UsageError("what should this peer be? say --serve-blocks with --model, --client, or --listen")
    if (token_file or no_token) and http is None:
        raise click.UsageError("--token-file and --no-token are for --http HOST:PORT")
    if no_token and http is not None and not is_loopback(http[0]):
        raise click.UsageError(f"--no-token would open {http[0]} to the network: it is for 127.0.0.1, ::1 or localhost")
    if announce and not (serve_blocks or listen):
        raise click.UsageError("--announce needs --listen: who dials the address must reach this peer")
    if relay and not (serve_blocks or listen):
        raise click.UsageError("--relay needs --listen: those for whom it relays must reach this peer")
    from peerd.cli.daemon import Daemon
    from peerd.peer import DEFAULT_LISTEN

    specs: tuple[ServeSpec, ...] = ()
    if serve_blocks is not None:
        model = models[0][1] if models else ""
        with working("starting"):
            from peerd.compute.quantized.formats import NONE
            from peerd.spans.devices import check_devices
            from peerd.spans.spec import ServeSpec

            device = check_devices(",".join(devices) or "cpu")
        blocks = None if isinstance(serve_blocks, str) else serve_blocks
        specs = (ServeSpec(model, blocks, device=device, quantize=quantize or NONE, **serving),)
        listen = listen or (DEFAULT_LISTEN,)
    return Daemon(
        identity=identity or platformdirs.user_state_path("peerd") / "identity.key",
        listen=listen,
        announce=announce,
        joining=swarm,
        serve=specs,
        stop_on_eof=stop_on_eof,
        disk_bytes=disk_bytes,
        relay=relay,
        offer=_offer(models, socket_path, http, token_file, no_token, open_page) if offers else None,
    )


def _offer(
    models: tuple[tuple[str | None, Path | str], ...],
    socket_path: Path | None,
    http: tuple[str, int] | None,
    token_file: Path | None,
    no_token: bool,
    open_page: bool,
) -> Offered:
    from peerd.cli.daemon import Offered
    from peerd.local.socket_path import default_socket_path

    names = [name for name, _ in models if name is not None]
    if len(set(names)) < len(names):
        raise click.UsageError("two of --model have the same NAME")
    if http is not None and not no_token and token_file is None:
        token_file = platformdirs.user_state_path("peerd") / "api.token"
    return Offered(models, socket_path or default_socket_path(), http, token_file, open_page)
