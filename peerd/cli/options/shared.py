"""Options that several commands share, and what they mean.

It imports nothing slow, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from peerd.cli.options.parsing import parse_bootstrap, parse_memory, parse_model, parse_one_device, parse_peer_id
from peerd.cli.watching.logs import LOG_FORMATS
from peerd.protocol.addresses import Multiaddr

if TYPE_CHECKING:
    from peerd.routing.chains.rules import ChainRules

Command = TypeVar("Command", bound=Callable[..., Any])

# What the wire can carry (spec/tensors.md).
DTYPES = ("float32", "float16", "bfloat16")
# The formats of compute/quantized/formats.py, whose import would load torch.
QUANTIZATIONS = ("none", "int8", "nf4", "packed")
# Those of peerd/spans/spec.py, likewise.
ENGINES = ("auto", "torch", "llamacpp")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

bootstrap_option = click.option(
    "--bootstrap",
    type=parse_bootstrap,
    multiple=True,
    metavar="MULTIADDR",
    envvar="PEERD_BOOTSTRAP",
    help="A peer of the swarm to join: an address that it printed. Repeat it for several. Default: the"
    " addresses in PEERD_BOOTSTRAP, with spaces between them.",
)
swarm_key_option = click.option(
    "--swarm-key",
    type=_FILE,
    metavar="FILE",
    help="The key of a private swarm, which all its peers share; peerd keys new-swarm makes one.",
)
no_relay_option = click.option(
    "--no-relay",
    is_flag=True,
    help="Use no relays: neither to reach peers behind NATs, which cannot be dialled, nor to be reached behind a NAT.",
)
no_punch_option = click.option(
    "--no-punch",
    is_flag=True,
    help="Reach a peer behind a relay only through that relay, and do not try to connect directly through both NATs, by"
    " which the peer would learn this machine's IP address.",
)


@dataclass(frozen=True, slots=True)
class JoinOptions:
    """Which swarm to join, which of its peers to use, and whether through relays or beside them."""

    bootstrap: tuple[Multiaddr, ...]
    swarm_key: bytes | None
    rules: ChainRules | None
    may_be_relayed: bool = True
    may_punch: bool = True


def joining(options: dict[str, Any]) -> JoinOptions:
    """Take the options of `join_options` out of a command's. Raises InvalidRequest for files that are not valid."""
    from peerd.cli.keys.swarm_key import read_swarm_key
    from peerd.routing.chains.rules import ChainRules, Manifest

    key_file, manifests = options.pop("swarm_key"), options.pop("manifests")
    allowed, blocked, trusted = (frozenset(options.pop(name)) for name in ("allowed", "blocked", "trusted"))
    rules = None
    if allowed or blocked or trusted or manifests:
        pinned = tuple(Manifest.read(path) for path in manifests)
        rules = ChainRules(allowed or None, blocked, trusted, pinned)
    key = read_swarm_key(key_file) if key_file else None
    may_be_relayed, may_punch = not options.pop("no_relay"), not options.pop("no_punch")
    return JoinOptions(options.pop("bootstrap"), key, rules, may_be_relayed, may_punch)


def join_options(command: Command) -> Command:
    """Add the options for joining a swarm and choosing the peers of chains; `joining` reads them."""
    peers: dict[str, Any] = {"type": parse_peer_id, "multiple": True, "metavar": "PEERID"}
    for option in reversed(
        (
            bootstrap_option,
            swarm_key_option,
            click.option("--allow", "allowed", **peers, help="Use only these peers' blocks. Repeat it for several."),
            click.option("--block", "blocked", **peers, help="Never use this peer's blocks."),
            click.option(
                "--trusted",
                **peers,
                help="Only these peers may run the model's first and last blocks, which are nearest to the text.",
            ),
            click.option(
                "--manifest",
                "manifests",
                type=_FILE,
                multiple=True,
                metavar="FILE",
                help="Use only peers that announce exactly these weights; peerd manifest MODEL makes the file.",
            ),
            no_relay_option,
            no_punch_option,
        )
    ):
        command = option(command)
    return command


socket_option = click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The socket of the daemon. Default: where peerd --client opens it.",
)
revision_option = click.option(
    "--revision", metavar="REV", help="The branch, tag or commit of a model on the hub; the same as org/name@REV."
)
disk_option = click.option(
    "--disk",
    "disk_bytes",
    type=parse_memory,
    metavar="SIZE",
    help="The most disk space for all of peerd's downloads from the hub, such as 200GB. peerd deletes the least"
    " recently used files first, and never those that a running peer reads or that other programs put into the cache."
    " Default: no limit.",
)
verbose_option = click.option("-v", "--verbose", is_flag=True, help="Log what happens in detail.")
log_format_option = click.option(
    "--log-format",
    type=click.Choice(LOG_FORMATS),
    default="text",
    show_default=True,
    help="How the log is written: lines for people, or a JSON object a line (time, level, logger, message, exception).",
)
speculate_option = click.option(
    "--speculate/--no-speculate",
    default=True,
    help="Guess tokens ahead where that is faster, and have the servers check them. The answer is the same."
    " Default: on.",
)
draft_device_option = click.option(
    "--draft-device",
    type=parse_one_device,
    metavar="DEVICE",
    help="Where the model of --draft runs: cpu, cuda (the first GPU) or cuda:N. Default: cpu.",
)
remote_head_option = click.option(
    "--remote-head",
    is_flag=True,
    help="Have the last server draw the tokens, where it offers that (--serve-head): the same tokens, with less memory"
    " and less to receive here. That server then learns how tokens are chosen, with the seed.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming text.")


@dataclass(frozen=True, slots=True)
class Drafting:
    """The small model that guesses tokens, and the device on which it runs."""

    model: Path | str
    device: str = "cpu"


def draft_options(command: Command) -> Command:
    """Add the options of a model that guesses tokens for another; `drafting` reads them."""
    draft = click.option(
        "--draft",
        type=parse_model,
        metavar="MODEL",
        help="Let this small model guess tokens, where that is faster; it must have the same tokenizer. Or a head that"
        " peerd train-draft made. It is fetched and run whole on this machine. The answer is the same.",
    )
    return draft(draft_device_option(command))


def drafting(options: dict[str, Any], *, speculate: bool) -> Drafting | None:
    """Take the options of `draft_options` out of a command's. Raises click.UsageError."""
    model, device = options.pop("draft"), options.pop("draft_device")
    if model is not None and not speculate:
        raise click.UsageError("--draft guesses tokens, and --no-speculate says that none are guessed: leave out one")
    if model is None:
        if device is not None:
            raise click.UsageError("--draft-device is for --draft MODEL: add it")
        return None
    return Drafting(model, device or "cpu")


def sampling_options(command: Command) -> Command:
    """Add the options for sampling. For those left out, the model's own generation config decides."""
    for option in reversed(
        (
            click.option(
                "--temperature",
                type=click.FloatRange(min=0),
                metavar="T",
                help="0 takes the most likely token. Default: the model's.",
            ),
            click.option(
                "--top-k",
                type=click.IntRange(min=0),
                metavar="K",
                help="Choose among the K most likely tokens; 0: all. Default: the model's.",
            ),
            click.option(
                "--top-p",
                type=click.FloatRange(0, 1, min_open=True),
                metavar="P",
                help="Choose among the most likely tokens that together have probability P. Default: the model's.",
            ),
            click.option(
                "--seed",
                type=click.IntRange(min=0),
                metavar="N",
                help="The same seed draws the same tokens. Default: another one each time.",
            ),
        )
    ):
        command = option(command)
    return command
