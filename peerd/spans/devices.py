"""Several devices in one peer: which there are, and which of them runs which of its blocks.

Each device gets an engine with its own span; all have one identity. Other peers see one peer that announces several
spans, and a session that needs several of them has a hop for each. A span is divided among the devices in proportion to
their free memory. Nothing is loaded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from peerd.protocol.errors import InvalidRequest
from peerd.protocol.span import Span

if TYPE_CHECKING:
    from peerd.compute.checkpoint.checkpoint import Checkpoint
    from peerd.spans.spec import ServeSpec

ALL_GPUS = "cuda:all"


def check_devices(names: str) -> str:
    """The devices in a list such as `cuda:0,cuda:1`; `cuda:all` is replaced by all GPUs.

    Raises InvalidRequest if torch cannot compute on one of them, or a GPU is named twice.
    """
    import torch

    count = torch.cuda.device_count()
    every = [f"cuda:{index}" for index in range(count)] or ["cuda:0"]
    found: list[str] = []
    for name in names.split(","):
        # Without a number, torch would use the GPU that a thread used last.
        found += every if name == ALL_GPUS else ["cuda:0" if name == "cuda" else name]
    gpus = [device.index for device in map(torch.device, found) if device.type == "cuda"]
    if gpus and max(gpus) >= count:
        raise InvalidRequest(
            f"there is no cuda:{max(gpus)} here: torch {torch.__version__} sees {count} CUDA devices;"
            " leave out --device to use the CPU"
        )
    if len(set(gpus)) < len(gpus):
        raise InvalidRequest(f"--device names a GPU twice: {','.join(found)}")
    return ",".join(found)


def specs_by_device(spec: ServeSpec) -> list[ServeSpec]:
    """The spec for each of its devices. If a device is named several times, its memory is divided."""
    from peerd.compute.device.free_memory import free_memory

    names = spec.device.split(",")
    specs = []
    for name in names:
        own = replace(spec, device=name)
        if names.count(name) > 1:
            # Other spans have claims only on the host's memory.
            promised = spec.promised_bytes if name == "cpu" else 0
            given = spec.memory_bytes or max(0, free_memory(name) - promised)
            own = replace(own, memory_bytes=given // names.count(name))
        specs.append(own)
    return specs


def rooms(specs: Sequence[ServeSpec], checkpoint: Checkpoint) -> list[int]:
    """How many blocks fit on each device. Raises InvalidRequest if none fits on any. Blocks the thread."""
    from peerd.spans.budget import how_many_blocks

    found: list[int] = []
    refusal: InvalidRequest | None = None
    for spec in specs:
        try:
            found.append(how_many_blocks(replace(spec, blocks=None), checkpoint))
        except InvalidRequest as error:
            refusal = error
            found.append(0)
    if refusal is not None and not any(found):
        raise refusal
    return found


def share_span(span: Span, room: Sequence[int]) -> list[Span | None]:
    """Divide a span among devices in proportion to their room, in order. None for a device that gets no block."""
    total = sum(room)
    spans: list[Span | None] = []
    start, before = span.start, 0
    for own in room:
        before += own
        # Rounded sums instead of sums of rounded shares, so that the last device ends where the span does.
        end = span.start + (2 * len(span) * before + total) // (2 * total)
        spans.append(Span(start, end) if end > start else None)
        start = end
    return spans
