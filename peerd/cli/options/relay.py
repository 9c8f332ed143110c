"""The options of a relay: whether this peer relays for others, and with what limits."""

from __future__ import annotations

from typing import Any

import click

from peerd.cli.options.parsing import parse_memory
from peerd.cli.options.shared import Command
from peerd.protocol.messages.relay import MAX_RATE
from peerd.reach.relay_ledger import RelayLimits

# A circuit passes messages of 16 KiB as a whole: slower than one a second, it would be useless.
MIN_RATE_BYTES = 16 * 1024
_DEFAULTS = RelayLimits()
_MIB = 2**20


def parse_rate(value: str) -> int:
    """Parse bytes a second."""
    found = parse_memory(value)
    if found < MIN_RATE_BYTES:
        raise click.BadParameter(f"{value} a second is too little for a relay: give 16KiB or more")
    if found > MAX_RATE:
        raise click.BadParameter(f"{value} a second is more than a relay can promise: give 1TiB or less")
    return found


_OPTIONS = (
    click.option(
        "--relay",
        is_flag=True,
        help="Relay for peers behind NATs, which cannot be dialled, within the limits of the next options. What they"
        " send each other is encrypted for its receiver. Others must be able to reach this peer.",
    ),
    click.option(
        "--relay-slots",
        "slots",
        type=click.IntRange(min=1, max=65535),
        metavar="N",
        help=f"With --relay: how many peers it makes reachable. Default: {_DEFAULTS.slots}.",
    ),
    click.option(
        "--relay-circuits",
        "circuits",
        type=click.IntRange(min=1, max=65535),
        metavar="N",
        help="With --relay: how many connections to them it carries at a time; each may take up to 256 KiB of memory."
        f" Default: {_DEFAULTS.circuits}.",
    ),
    click.option(
        "--relay-rate",
        "bytes_a_second",
        type=parse_rate,
        metavar="SIZE",
        help="With --relay: bytes a second, in each direction of one connection."
        f" Default: {_DEFAULTS.bytes_a_second // _MIB}MiB.",
    ),
    click.option(
        "--relay-total-rate",
        "total_bytes_a_second",
        type=parse_rate,
        metavar="SIZE",
        help=f"With --relay: bytes a second of them all. Default: {_DEFAULTS.total_bytes_a_second // _MIB}MiB.",
    ),
    click.option(
        "--relay-hours",
        "circuit_hours",
        type=click.FloatRange(min=0.01, max=720),
        metavar="HOURS",
        help=f"With --relay: how long one connection may last. Default: {_DEFAULTS.circuit_s // 3600}.",
    ),
)
_LIMITS = ("slots", "circuits", "bytes_a_second", "total_bytes_a_second", "circuit_hours")


def relay_options(command: Command) -> Command:
    """Add the options of a relay to a command; `relaying` reads them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def relaying(options: dict[str, Any]) -> RelayLimits | None:
    """Take a relay's options out of a command's: its limits, or None for no relay.

    Raises click.UsageError if they contradict each other.
    """
    relay = options.pop("relay")
    given = {name: value for name in _LIMITS if (value := options.pop(name)) is not None}
    if not relay:
        if given:
            raise click.UsageError("--relay-slots and the like limit a relay: add --relay")
        return None
    hours = given.pop("circuit_hours", None)
    if hours is not None:
        given["circuit_s"] = max(1, int(hours * 3600))
    return RelayLimits(**given)
