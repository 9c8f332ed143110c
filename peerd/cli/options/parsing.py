"""Parses the values of command-line options, and refuses wrong ones with a reason."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import click

from peerd.compute.checkpoint.hub.id import hub_id_of, parse_hub_id
from peerd.compute.device.sizes import parse_size
from peerd.compute.errors import CheckpointError
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import PeerId, public_key_of
from peerd.protocol.messages.adapters import check_name
from peerd.protocol.span import MAX_BLOCKS, Span

AUTO = "auto"
OFF = "off"


def parse_address(value: str) -> Multiaddr:
    """Parse a multiaddr."""
    try:
        return Multiaddr.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def parse_bootstrap(value: str) -> Multiaddr:
    """Parse a multiaddr with a PeerId: joining through the peer that answers could mean joining any swarm."""
    found = parse_address(value)
    if found.peer_id is None:
        raise click.BadParameter(f"{value} has no PeerId: add /p2p/PEERID, as that peer prints it")
    return found


def parse_blocks(value: str) -> Span | int | str:
    """Parse `A:B`, a count, or `auto`."""
    if value == AUTO:
        return AUTO
    if value.isascii() and value.isdecimal() and 0 < int(value) <= MAX_BLOCKS:
        return int(value)
    try:
        return Span.parse(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}; or say how many, such as 8, or auto") from None


def parse_probability(value: str) -> float:
    """Parse `off`, or a probability such as 0.02 or 1/50."""
    if value == OFF:
        return 0.0
    over, _, under = value.partition("/")
    try:
        found = float(over) / float(under or 1)
    except (ValueError, ZeroDivisionError):
        found = -1.0
    if not 0 < found <= 1:
        raise click.BadParameter(f"{value!r} is not off, nor a probability such as 0.02 or 1/50")
    return found


def parse_model(value: str) -> Path | str:
    """The path of a checkpoint on this machine, checked only by its file names; or a hub id, as it was written."""
    path = Path(value).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if (path / "config.json").is_file():
        return path
    if path.is_dir():
        raise click.BadParameter(f"{value} has no config.json, so it is not a model's directory")
    if path.exists():
        raise click.BadParameter(f"{value} is neither a .gguf file nor a directory with config.json and safetensors")
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
    """The model at the revision that is given separately."""
    try:
        found = hub_id_of(model, revision)
    except CheckpointError as error:
        raise click.BadParameter(str(error), param_hint="--revision") from None
    return model if found is None else str(found)


def parse_named_model(value: str) -> tuple[str | None, Path | str]:
    """A model and its name in the local API: `NAME=MODEL`; without a name, the model's own."""
    name, separator, path = value.partition("=")
    if separator and "/" not in name and not Path(value).exists():
        if not name:
            raise click.BadParameter(f"{value} has no name before the =")
        return name, parse_model(path)
    return None, parse_model(value)


def parse_host_port(value: str) -> tuple[str, int]:
    """Parse `HOST:PORT`; an IPv6 host is in brackets."""
    host, _, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise click.BadParameter(f"{value!r} is not HOST:PORT, such as 127.0.0.1:8080")
    return host, int(port)


def parse_host_name(value: str) -> str:
    """Parse the name of a host, without a port."""
    if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?", value) is None:
        raise click.BadParameter(f"{value!r} is not the name of a host, such as host.docker.internal")
    return value


def parse_origin(value: str) -> str:
    """Parse a page's origin: a scheme, a host and maybe a port, as browsers send it."""
    if re.fullmatch(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?", value) is None:
        raise click.BadParameter(f"{value!r} is not an origin, such as http://localhost:3000, without a path")
    return value


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def parse_device(value: str) -> str:
    """A device by torch's name, `cuda:all`, or several with commas. Only torch can tell whether they exist."""
    for name in value.split(","):
        if re.fullmatch(r"cpu|cuda(:\d{1,3}|:all)?", name) is None:
            raise click.BadParameter(f"{name!r} is not cpu, cuda, cuda:N or cuda:all")
    return value


def parse_one_device(value: str) -> str:
    """One device by torch's name."""
    if re.fullmatch(r"cpu|cuda(:\d{1,3})?", value) is None:
        raise click.BadParameter(f"{value!r} is not cpu, cuda or cuda:N")
    return value


def parse_adapter(value: str) -> tuple[str, str | Path]:
    """`NAME=SOURCE`, a directory or a hub id; or a hub id alone, whose last part is the name."""
    name, equals, source = value.partition("=")
    try:
        if not equals:
            hub_id = hub_id_of(value)
            if hub_id is None:
                raise ValueError(f"{value!r} is neither NAME=DIR, NAME=org/name nor org/name")
            return check_name(hub_id.name), value
        if not source:
            raise ValueError(f"{value!r} has nothing after the =")
        return check_name(name), Path(source).expanduser() if hub_id_of(source) is None else source
    except (ValueError, CheckpointError) as error:
        raise click.BadParameter(str(error)) from None


def parse_memory(value: str) -> int:
    """Parse an amount of memory, to bytes."""
    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def parse_limit(value: str) -> int:
    """Parse an amount of memory that may be 0."""
    return 0 if value.strip() == "0" else parse_memory(value)


def parse_peer_id(value: str) -> PeerId:
    """Parse a PeerId."""
    try:
        public_key_of(PeerId(value))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return PeerId(value)
