"""`peerd blocks MODEL`: which blocks fit here, as a table, and as a finding of the doctor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from peerd.checkpoints import Checkpoints
from peerd.cli.console import printable, table, working, write
from peerd.cli.doctor.finding import Finding, error, ok, warning
from peerd.cli.doctor.fitting import Fit, Fitting, fitting_of
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.compute.device.sizes import format_size
from peerd.compute.errors import CheckpointError
from peerd.protocol.errors import CallerError

if TYPE_CHECKING:
    from peerd.spans.spec import ServeSpec

_HEADINGS = ("stored as", "blocks that fit", "a block", "KV for", "all of it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be served, and where. `None` is what a server takes without the option."""

    model: Path | str
    devices: tuple[str, ...] = ()
    dtype: str | None = None
    kv_tokens: int | None = None
    memory_bytes: int | None = None


async def show_blocks(wanted: Wanted, *, as_json: bool) -> None:
    """Print what fits. Raises CheckpointError, InvalidRequest."""
    with working(f"looking at {wanted.model}"):
        found = await fittings(wanted)
    text = json.dumps([_as_json(one) for one in found], indent=2) if as_json else "\n\n".join(map(as_text, found))
    write(text + "\n")


async def fittings(wanted: Wanted) -> list[Fitting]:
    """What fits on each device. Raises CheckpointError, InvalidRequest."""
    hub = HubSettings()
    async with Checkpoints(hub).open(wanted.model) as checkpoint:

        def look() -> list[Fitting]:
            return [fitting_of(spec, checkpoint) for spec in _specs(wanted)]

        return await trio.to_thread.run_sync(look)


def _specs(wanted: Wanted) -> list[ServeSpec]:
    from peerd.spans.devices import check_devices
    from peerd.spans.spec import ServeSpec

    spec = ServeSpec(wanted.model, None, dtype=wanted.dtype)
    spec = replace(spec, kv_tokens=wanted.kv_tokens, memory_bytes=wanted.memory_bytes)
    devices = dict.fromkeys(check_devices(",".join(wanted.devices) or "cpu").split(","))
    return [replace(spec, device=device) for device in devices]


def as_text(found: Fitting) -> str:
    """One device's table, and below it why some ways do not work."""
    memory = f"{format_size(found.given_bytes)} {'given' if found.is_limited else 'of memory can be taken'}"
    head = (
        f"{printable(found.model)}: {found.block_count} blocks; {memory} on {found.device}, computing in {found.dtype}"
    )
    rows = [_row(fit, found.block_count) for fit in found.fits if not fit.problem]
    lines = [head, *([table([_HEADINGS, *rows])] if rows else [])]
    lines += [f"{fit.quantize}: {printable(fit.problem)}" for fit in found.fits if fit.problem]
    return "\n".join(lines)


def _row(fit: Fit, block_count: int) -> Sequence[str]:
    return (
        fit.quantize + (" (default)" if fit.is_default else ""),
        f"{fit.count} of {block_count}",
        format_size(fit.block_bytes),
        f"{fit.kv_tokens} positions",
        format_size(fit.total_bytes),
    )


def _as_json(found: Fitting) -> dict[str, object]:
    return asdict(found)


async def look_at_blocks(model: Path | str) -> list[Finding]:
    """What the doctor says of a model that is to be served."""
    try:
        return [finding for found in await fittings(Wanted(model=model)) for finding in block_findings(found)]
    except (CallerError, CheckpointError) as problem:
        return [error("blocks", f"{model} cannot be served: {problem}", "peerd models --families lists what can be")]


def block_findings(found: Fitting) -> list[Finding]:
    """Whether a server of the model would be of use here."""
    chosen = next(fit for fit in found.fits if fit.is_default)
    others = [f"{fit.count} as {fit.quantize}" for fit in found.fits if not fit.is_default and fit.count > chosen.count]
    more = f"; {', '.join(others)}" if others else ""
    if chosen.problem:
        if others:
            said = f"no block of {found.model} fits as {chosen.quantize}{more}"
            return [warning("blocks", said, f"serve with --quantize {others[0].rpartition(' ')[2]}")]
        return [error("blocks", chosen.problem, "free some memory, or serve a smaller model")]
    said = (
        f"{chosen.count} of {found.block_count} blocks of {found.model} fit as {chosen.quantize},"
        f" {format_size(chosen.block_bytes)} each, with KV for {chosen.kv_tokens} positions{more}"
    )
    return [ok("blocks", said)]
