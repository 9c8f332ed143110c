"""The `peerd` command: options in, exit codes out.

Knows what can be asked for and how to say that it is wrong; the work is done in `cli_serve`,
`cli_generate` and `demo`, which are imported when they are needed.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import click
import platformdirs
import trio
from click.core import ParameterSource

from peerd.cli_options import (
    DTYPES,
    QUANTIZATIONS,
    at_revision,
    disk_option,
    is_loopback,
    join_options,
    joining,
    json_option,
    parse_adapter,
    parse_address,
    parse_blocks,
    parse_device,
    parse_host_port,
    parse_limit,
    parse_memory,
    parse_model,
    parse_named_model,
    revision_option,
    sampling_options,
    verbose_option,
)
from peerd.compute.errors import CheckpointError
from peerd.console import say, set_up_logging, working
from peerd.processes import ProcessEnded
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import CallerError, LinkFailed, NoChain, Overloaded, PeerFault
from peerd.protocol.span import Span

if TYPE_CHECKING:
    from peerd.cli_options import Joining
    from peerd.cli_serve import Daemon, Offered
    from peerd.serving import ServeSpec

EXIT_USAGE = 2
EXIT_NO_CHAIN = 3
EXIT_PEERS = 4
EXIT_SIGINT = 130

_EXIT_CODES = """\b
Exit codes:
  0    done; a daemon: stopped as it was told to
  2    a mistake in the command, or a model that cannot be used
  3    nobody serves some blocks of the model; the message says which
  4    peers failed, or all of them are busy
  130  interrupted by Ctrl-C (143: by SIGTERM)
"""
_EXAMPLES = """\b
Examples:
  peerd demo                                          a swarm on this machine
  peerd --listen /ip4/0.0.0.0/tcp/31330/ws            a bootstrap peer
  peerd --serve-blocks 0:16 --model DIR --bootstrap ADDRESS
  peerd generate DIR --prompt "Hello" --bootstrap ADDRESS
  peerd --serve-blocks auto --model org/name --disk 100GB --bootstrap ADDRESS
"""
DEMO_PROMPT = "Explain in two sentences how bees make honey."


class _Cli(click.Group):
    """A group that turns the errors that peerd has names for into messages and exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NoChain as error:
            _fail(ctx, error, EXIT_NO_CHAIN)
        except (PeerFault, LinkFailed, Overloaded, ProcessEnded) as error:
            _fail(ctx, error, EXIT_PEERS)
        except (CallerError, CheckpointError) as error:
            _fail(ctx, error, EXIT_USAGE)
        except KeyboardInterrupt:
            ctx.exit(EXIT_SIGINT)


def _fail(ctx: click.Context, error: Exception, code: int) -> None:
    say(f"Error: {error}")
    ctx.exit(code)


@click.group(
    cls=_Cli,
    invoke_without_command=True,
    epilog=f"{_EXAMPLES}\n{_EXIT_CODES}",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--serve-blocks",
    type=parse_blocks,
    metavar="A:B|N|auto",
    help="Serve blocks A to B-1 of --model; or N blocks; or all that fit into free memory. Without A:B the swarm"
    " decides which, now and later: see --no-move.",
)
@click.option(
    "--no-move",
    "stay",
    is_flag=True,
    help="With --serve-blocks N or auto: keep the blocks that were chosen at the start. Otherwise the server moves, its"
    " sessions ended first, where other blocks lack servers much more.",
)
@click.option(
    "--model",
    "models",
    type=parse_named_model,
    multiple=True,
    metavar="[NAME=]MODEL",
    help="A model's directory, a .gguf file, or org/name[@revision] on the hub: the one to serve, or one that the local"
    " API offers as NAME. Repeat it for several.",
)
@revision_option
@disk_option
@click.option(
    "--client",
    is_flag=True,
    help="Stay in the swarm for the programs on this machine, which ask through the local API.",
)
@click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Offer the local API on this unix socket. Default with --client: $XDG_RUNTIME_DIR/peerd.sock, else"
    " /tmp/peerd-UID/peerd.sock.",
)
@click.option(
    "--http",
    type=parse_host_port,
    metavar="HOST:PORT",
    help="Offer the local API on a TCP port too, to whoever has the token.",
)
@click.option(
    "--token-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where the token of --http lies; made if it is not there. Default: in the state directory.",
)
@click.option("--no-token", is_flag=True, help="Ask for no token: any program on this machine may use --http.")
@join_options
@click.option(
    "--listen",
    type=parse_address,
    multiple=True,
    metavar="MULTIADDR",
    help="Where to listen. Default for a server: /ip4/0.0.0.0/tcp/0/ws, any free port.",
)
@click.option(
    "--announce",
    type=parse_address,
    multiple=True,
    metavar="MULTIADDR",
    help="Announced instead of the listen addresses, for forwarded ports and proxies.",
)
@click.option(
    "--identity",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The key that this peer is; made if it is not there. Each daemon needs its own. What the peer keeps across"
    " restarts lies beside it.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="What to compute in. Default: the checkpoint's.")
@click.option(
    "--device",
    "devices",
    type=parse_device,
    multiple=True,
    metavar="DEVICE",
    help="cpu, cuda (the first GPU), cuda:N, or cuda:all. Repeat it for several: each runs a part of the blocks, as its"
    " memory allows. Default: cpu.",
)
@click.option("--kv-tokens", type=click.IntRange(min=1), metavar="N", help="Positions to keep KV for, of all sessions.")
@click.option(
    "--memory",
    "memory_bytes",
    type=parse_memory,
    metavar="SIZE",
    help="What serving may take beyond the program itself, on each device, such as 6GiB. Default: what is free.",
)
@click.option(
    "--quantize",
    type=click.Choice(QUANTIZATIONS),
    help="How weights are stored: int8 in half of what bfloat16 takes, nf4 in a little more than a quarter. Default:"
    " none, which is most exact.",
)
@click.option(
    "--throughput",
    type=click.FloatRange(min=0, min_open=True),
    metavar="RATE",
    help="Announce this speed, in positions a second through one block, instead of measuring it once.",
)
@click.option(
    "--adapter",
    "adapters",
    type=parse_adapter,
    multiple=True,
    metavar="NAME=DIR",
    help="Serve a LoRA adapter too, as peft saved it, for the sessions that ask for NAME. Repeat it for several.",
)
@click.option(
    "--client-adapters",
    "client_adapter_bytes",
    type=parse_limit,
    metavar="SIZE",
    help="How large an adapter clients may bring, each for its own session; 0: none. Default: 64MB, or a 64th of the"
    " memory.",
)
@click.option("--stop-on-eof", is_flag=True, help="Stop when standard input ends: for programs that start peers.")
@verbose_option
@click.version_option(package_name="peerd")
@click.pass_context
def cli(ctx: click.Context, /, **options: Any) -> None:
    """Run a language model that is bigger than any machine you own.

    Without a COMMAND this is a daemon: a peer of a swarm, until it is stopped. With --serve-blocks it runs
    some of a model's blocks for others; with --client it joins without serving; with --listen alone it is
    a bootstrap peer, which only keeps the swarm's directory. Once it is up it prints the addresses under
    which others reach it, one a line: give them to others as --bootstrap.

    SIGTERM tells the swarm that the peer leaves and gives open sessions a minute to end; Ctrl-C gives
    them a second; a second signal stops at once.
    """
    given = [name for name in options if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if ctx.invoked_subcommand is not None:
        if given:
            option = next(param.opts[-1] for param in cli.params if param.name == given[0])
            raise click.UsageError(f"{option} belongs behind {ctx.invoked_subcommand}, or to a daemon")
        return
    if not given:
        click.echo(ctx.get_help())
        return
    set_up_logging(logging.DEBUG if options.pop("verbose") else logging.INFO)
    swarm = joining(options)
    daemon = _daemon(swarm, **options)
    from peerd.cli_serve import run_daemon

    _run(ctx, partial(run_daemon, daemon))


@cli.command(epilog=_EXIT_CODES)
@click.argument("model", type=parse_model, metavar="MODEL")
@revision_option
@disk_option
@click.option("--prompt", metavar="TEXT", help="What to continue, or to answer with --chat; - reads standard input.")
@click.option("--prompt-file", type=click.File(encoding="utf-8"), metavar="FILE", help="Read the prompt from a file.")
@click.option("--chat", is_flag=True, help="Ask in the model's chat template, as a user would.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), metavar="N", help="At most this long. Default: 256.")
@click.option(
    "--adapter",
    metavar="NAME|DIR",
    help="Under a LoRA adapter that the swarm serves; or under your own, whose directory (with a / in it) is sent to"
    " the peers for this answer.",
)
@sampling_options
@json_option
@join_options
@verbose_option
@click.pass_context
def generate(
    ctx: click.Context,
    /,
    model: Path | str,
    revision: str | None,
    disk_bytes: int | None,
    prompt: str | None,
    prompt_file: TextIO | None,
    chat: bool,
    adapter: str | None,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Generate text with MODEL, whose blocks a swarm runs.

    MODEL is a directory with config.json and safetensors, a .gguf file, or org/name on the model hub; only its
    embeddings and its head are fetched and read here. The text goes to standard output as it comes; all else to
    standard error.
    """
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("say --prompt TEXT, --prompt - to read standard input, or --prompt-file FILE")
    swarm = joining(options)
    if not swarm.bootstrap:
        raise click.UsageError("--bootstrap is missing: an address that a peer of the swarm printed")
    if prompt_file is not None:
        prompt = prompt_file.read()
    elif prompt == "-":
        prompt = sys.stdin.read()
    from peerd.cli_generate import Request
    from peerd.cli_generate import generate as run_generate

    # A name has no slash in it.
    chosen = Path(adapter).expanduser() if adapter is not None and "/" in adapter else adapter
    request = Request(prompt or "", chat, options, chosen)
    work = partial(run_generate, at_revision(model, revision), swarm, request, as_json=as_json, disk_bytes=disk_bytes)
    _run_once(ctx, work, verbose=verbose)


@cli.command(epilog=_EXIT_CODES)
@click.option("--prompt", default=DEMO_PROMPT, show_default=True, metavar="TEXT", help="What to ask the model.")
@click.option("--servers", type=click.IntRange(min=1), default=2, show_default=True, metavar="N", help="How many.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=96, show_default=True, metavar="N")
@sampling_options
@json_option
@verbose_option
@click.pass_context
def demo(
    ctx: click.Context, /, prompt: str, servers: int, max_new_tokens: int, as_json: bool, verbose: bool, **sampling: Any
) -> None:
    """Start a swarm on this machine, ask it something, and stop it.

    A bootstrap peer and the servers run as processes of their own on loopback; each server holds a part of
    SmolLM2-135M-Instruct, which is installed with the demonstration. Nothing leaves this machine.
    """
    with working("starting"):
        from peerd.cli_generate import Request
        from peerd.demo import demo as run_demo

    request = Request(prompt, True, {"max_new_tokens": max_new_tokens, **sampling})
    _run_once(ctx, partial(run_demo, request, servers, as_json=as_json), verbose=verbose)


@cli.command(epilog=_EXIT_CODES)
@click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The socket of the daemon. Default: where peerd --client opens it.",
)
@json_option
@click.pass_context
def status(ctx: click.Context, /, socket_path: Path | None, as_json: bool) -> None:
    """Say what the daemon on this machine does: peers, blocks, models and whether somebody serves all of them."""
    from peerd.cli_status import show_status

    _run_once(ctx, partial(show_status, socket_path, as_json=as_json), verbose=False)


@cli.command(epilog=_EXIT_CODES)
@click.argument("model", type=parse_model, metavar="MODEL")
@revision_option
@click.pass_context
def manifest(ctx: click.Context, /, model: Path | str, revision: str | None) -> None:
    """Print what the blocks of MODEL are, for --manifest: a digest of each block's weights, as JSON.

    Reads all weights once. Make it where you trust the files, and pin it where you generate.
    """
    from peerd.cli_manifest import print_manifest

    _run_once(ctx, partial(print_manifest, at_revision(model, revision)), verbose=False)


@cli.group()
def keys() -> None:
    """Make keys."""


@keys.command("new-swarm")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE")
def new_swarm(path: Path) -> None:
    """Write the key of a new private swarm to FILE.

    Give it to all peers of the swarm, as --swarm-key FILE, and to nobody else: strangers then learn neither who
    the peers are nor what they serve.
    """
    from peerd.swarm_key import create_swarm_key

    create_swarm_key(path)
    say(f"{path} holds the key of a new swarm: give it to its peers, each as --swarm-key FILE")


def _daemon(
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
    listen: tuple[Multiaddr, ...],
    announce: tuple[Multiaddr, ...],
    identity: Path | None,
    stop_on_eof: bool,
    devices: tuple[str, ...],
    quantize: str | None,
    **serving: Any,
) -> Daemon:
    """What the options ask for together. Raises click.UsageError where they do not fit each other."""
    offers = client or socket_path is not None or http is not None
    if serve_blocks is not None and len(models) != 1:
        raise click.UsageError("--serve-blocks says which blocks, --model of which one model: say each once")
    if (revision or disk_bytes) and not models:
        raise click.UsageError("--revision and --disk are for models: add --model")
    if revision and len(models) > 1:
        raise click.UsageError("--revision is for one --model; with several, write each as org/name@revision")
    models = tuple((name, at_revision(model, revision)) for name, model in models)
    if models and serve_blocks is None and not offers:
        raise click.UsageError("--model is for --serve-blocks, or for the local API: add --client, --socket or --http")
    if serve_blocks is None and any([devices, quantize, *serving.values()]):
        raise click.UsageError(
            "--dtype, --device, --kv-tokens, --memory, --quantize, --throughput, --adapter, --client-adapters and"
            " --no-move say how to serve: add --serve-blocks"
        )
    if serve_blocks is None and not (offers or listen):
        raise click.UsageError("what should this peer be? say --serve-blocks with --model, --client, or --listen")
    if (token_file or no_token) and http is None:
        raise click.UsageError("--token-file and --no-token are for --http HOST:PORT")
    if no_token and http is not None and not is_loopback(http[0]):
        raise click.UsageError(f"--no-token would open {http[0]} to the network: it is for 127.0.0.1, ::1 or localhost")
    if announce and not (serve_blocks or listen):
        raise click.UsageError("--announce needs --listen: who dials the address must reach this peer")
    from peerd.cli_serve import Daemon
    from peerd.peer import DEFAULT_LISTEN

    specs: tuple[ServeSpec, ...] = ()
    if serve_blocks is not None:
        model = models[0][1]
        with working("starting"):
            from peerd.compute.quantized_formats import NONE
            from peerd.devices import check_devices
            from peerd.serving import ServeSpec

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
        offer=_offer(models, socket_path, http, token_file, no_token) if offers else None,
    )


def _offer(
    models: tuple[tuple[str | None, Path | str], ...],
    socket_path: Path | None,
    http: tuple[str, int] | None,
    token_file: Path | None,
    no_token: bool,
) -> Offered:
    from peerd.api.sockets import default_socket_path
    from peerd.cli_serve import Offered

    names = [name for name, _ in models if name is not None]
    if len(set(names)) < len(names):
        raise click.UsageError("two of --model have the same NAME")
    if http is not None and not no_token and token_file is None:
        token_file = platformdirs.user_state_path("peerd") / "api.token"
    return Offered(models, socket_path or default_socket_path(), http, token_file)


def _run_once(ctx: click.Context, work: Callable[[], Awaitable[None]], *, verbose: bool) -> None:
    """Run a one-shot command: quiet unless it is to be verbose, ended by the first signal."""
    set_up_logging(logging.DEBUG if verbose else logging.WARNING)
    from peerd.signals import until_signalled

    _run(ctx, partial(until_signalled, work))


def _run(ctx: click.Context, work: Callable[[], Awaitable[None]]) -> None:
    from peerd.signals import Interrupted

    try:
        trio.run(work)
    except Interrupted as interrupted:
        ctx.exit(interrupted.exit_code)


def main() -> NoReturn:
    """The entry point."""
    try:
        cli(prog_name="peerd")
    except SystemExit as end:
        code = end.code
    # All that had to end has ended. Taking torch's modules apart would be another second or two of waiting.
    with suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)
