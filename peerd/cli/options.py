"""What options look like on the command line, and what is said where they are wrong.

Knows spellings; imports nothing slow, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from peerd.compute.checkpoint.hub.id import hub_id_of, parse_hub_id
from peerd.compute.device.sizes import parse_size
from peerd.compute.errors import CheckpointError
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import PeerId, public_key_of
from peerd.protocol.messages.adapters import check_name
from peerd.protocol.span import MAX_BLOCKS, Span

if TYPE_CHECKING:
    from peerd.routing.chains.rules import ChainRules

Command = TypeVar("Command", bound=Callable[..., Any])

# What the wire can carry (spec/tensors.md).
DTYPES = ("float32", "float16", "bfloat16")
# Those of compute/quantized/formats.py, which would import torch.
QUANTIZATIONS = ("none", "int8", "nf4")
AUTO = "auto"
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def parse_address(value: str) -> Multiaddr:
    """A multiaddr."""
    try:
        return Multiaddr.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def parse_bootstrap(value: str) -> Multiaddr:
    """A multiaddr that names its peer: joining a swarm through whoever answers would be joining anybody's."""
    found = parse_address(value)
    if found.peer_id is None:
        raise click.BadParameter(f"{value} does not say who is there: add /p2p/ and the PeerId, as that peer prints it")
    return found


def parse_blocks(value: str) -> Span | int | str:
    """`A:B`, a count, or `auto`."""
    if value == AUTO:
        return AUTO
    if value.isascii() and value.isdecimal() and 0 < int(value) <= MAX_BLOCKS:
        return int(value)
    try:
        return Span.parse(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}; or say how many, such as 8, or auto") from None


def parse_model(value: str) -> Path | str:
    """A checkpoint on this machine, as far as a look at the path can tell; or a hub id, as it was written."""
    path = Path(value).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if (path / "config.json").is_file():
        return path
    if path.is_dir():
        raise click.BadParameter(f"{value} has no config.json, so it is no model's directory")
    if path.exists():
        raise click.BadParameter(f"{value} is no .gguf file, and no directory with config.json and safetensors")
    try:
        if parse_hub_id(value) is not None:
            return value
    except CheckpointError as error:
        raise click.BadParameter(str(error)) from None
    raise click.BadParameter(
        f"{value} does not exist; a model is a directory with config.json and safetensors, a .gguf file, or called"
        " org/name on a model hub"
    )


def at_revision(model: Path | str, revision: str | None) -> Path | str:
    """The model at the revision that is given beside it."""
    try:
        found = hub_id_of(model, revision)
    except CheckpointError as error:
        raise click.BadParameter(str(error), param_hint="--revision") from None
    return model if found is None else str(found)


def parse_named_model(value: str) -> tuple[str | None, Path | str]:
    """A model, and the name that it has in the local API: `NAME=MODEL`; without one, its own name."""
    name, separator, path = value.partition("=")
    if separator and "/" not in name and not Path(value).exists():
        if not name:
            raise click.BadParameter(f"{value} has no name before the =")
        return name, parse_model(path)
    return None, parse_model(value)


def parse_host_port(value: str) -> tuple[str, int]:
    """`HOST:PORT`, the host in brackets where it is an IPv6 address."""
    host, _, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise click.BadParameter(f"{value!r} is not HOST:PORT, such as 127.0.0.1:8080")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def parse_device(value: str) -> str:
    """A device by torch's name, `cuda:all`, or several with commas; whether they are there only torch knows."""
    for name in value.split(","):
        if re.fullmatch(r"cpu|cuda(:\d{1,3}|:all)?", name) is None:
            raise click.BadParameter(f"{name!r} is not cpu, cuda, cuda:N or cuda:all")
    return value


def parse_adapter(value: str) -> tuple[str, Path]:
    """`NAME=DIR`."""
    name, equals, path = value.partition("=")
    try:
        if not equals or not path:
            raise ValueError(f"{value!r} is not NAME=DIR")
        return check_name(name), Path(path).expanduser()
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def parse_memory(value: str) -> int:
    """An amount of memory, in bytes."""
    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def parse_limit(value: str) -> int:
    """An amount of memory that may be none: 0."""
    return 0 if value.strip() == "0" else parse_memory(value)


def parse_peer_id(value: str) -> PeerId:
    """A PeerId."""
    try:
        public_key_of(PeerId(value))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return PeerId(value)


@dataclass(frozen=True, slots=True)
class Joining:
    """Which swarm, whom of it to use, and whether through relays."""

    bootstrap: tuple[Multiaddr, ...]
    swarm_key: bytes | None
    rules: ChainRules | None
    may_be_relayed: bool = True


def joining(options: dict[str, Any]) -> Joining:
    """Take the options of `join_options` out of a command's. Raises InvalidRequest for files that are not right."""
    from peerd.cli.key_files import read_swarm_key
    from peerd.routing.chains.rules import ChainRules, Manifest

    key_file, manifests = options.pop("swarm_key"), options.pop("manifests")
    allowed, blocked, trusted = (frozenset(options.pop(name)) for name in ("allowed", "blocked", "trusted"))
    rules = None
    if allowed or blocked or trusted or manifests:
        pinned = tuple(Manifest.read(path) for path in manifests)
        rules = ChainRules(allowed or None, blocked, trusted, pinned)
    key = read_swarm_key(key_file) if key_file else None
    return Joining(options.pop("bootstrap"), key, rules, may_be_relayed=not options.pop("no_relay"))


def join_options(command: Command) -> Command:
    """Which swarm to join, and whom of it to have in chains; `joining` reads them."""
    peers: dict[str, Any] = {"type": parse_peer_id, "multiple": True, "metavar": "PEERID"}
    for option in reversed(
        (
            click.option(
                "--bootstrap",
                type=parse_bootstrap,
                multiple=True,
                metavar="MULTIADDR",
                help="A peer of the swarm to join: an address that it printed. Repeat it for several.",
            ),
            click.option(
                "--swarm-key",
                type=_FILE,
                metavar="FILE",
                help="The key of a private swarm, which all its peers share; peerd keys new-swarm makes one.",
            ),
            click.option("--allow", "allowed", **peers, help="Use only these peers' blocks. Repeat it for several."),
            click.option("--block", "blocked", **peers, help="Never use this peer's blocks."),
            click.option(
                "--trusted",
                **peers,
                help="Have the model's first and last blocks, which are nearest to the text, run by these peers only.",
            ),
            click.option(
                "--manifest",
                "manifests",
                type=_FILE,
                multiple=True,
                metavar="FILE",
                help="Use only peers that announce just these weights; peerd manifest MODEL makes one.",
            ),
            click.option(
                "--no-relay",
                is_flag=True,
                help="Use nobody's relay: neither to reach peers behind NATs, whom nobody can dial, nor to be reached"
                " as one.",
            ),
        )
    ):
        command = option(command)
    return command


revision_option = click.option(
    "--revision", metavar="REV", help="The branch, tag or commit of a model on the hub; as good as org/name@REV."
)
disk_option = click.option(
    "--disk",
    "disk_bytes",
    type=parse_memory,
    metavar="SIZE",
    help="What peerd's downloads from the hub may take, all together, such as 200GB. What was used least recently is"
    " deleted first; never what a running peer reads, nor what other programs put into the cache.",
)
verbose_option = click.option("-v", "--verbose", is_flag=True, help="Log what happens in detail.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming text.")


def sampling_options(command: Command) -> Command:
    """How tokens are chosen; what is left out the model's own generation config decides."""
    for option in reversed(
        (
            click.option(
                "--temperature",
                type=click.FloatRange(min=0),
                metavar="T",
                help="0 takes the likeliest token. Default: the model's.",
            ),
            click.option("--top-k", type=click.IntRange(min=0), metavar="K", help="Among the K likeliest; 0: all."),
            click.option(
                "--top-p",
                type=click.FloatRange(0, 1, min_open=True),
                metavar="P",
                help="Among the likeliest that together have probability P.",
            ),
            click.option(
                "--seed",
                type=click.IntRange(min=0),
                metavar="N",
                help="The same seed draws the same tokens.",
            ),
        )
    ):
        command = option(command)
    return command
