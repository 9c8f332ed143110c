"""How many blocks of a model fit into this machine's memory, for each way of storing weights.

It computes what a server computes when it starts (`spans/budget.py`), and loads nothing: of a model on the hub only the
small files are fetched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peerd.protocol.errors import CallerError
from peerd.protocol.span import Span

if TYPE_CHECKING:
    from peerd.compute.checkpoint.checkpoint import Checkpoint
    from peerd.spans.spec import ServeSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What fits if weights are stored so; `problem` says why nothing does.

    block_bytes: the memory of the largest block. kv_tokens: the positions of KV beside that many blocks.
    total_bytes: what all of it takes at most. is_default: a server takes this way without --quantize.
    """

    quantize: str
    is_default: bool
    count: int = 0
    block_bytes: int = 0
    kv_tokens: int = 0
    total_bytes: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """What fits on one device. given_bytes: the memory that may be taken. dtype: what blocks compute in."""

    model: str
    block_count: int
    device: str
    dtype: str
    given_bytes: int
    is_limited: bool
    fits: tuple[Fit, ...]


def fitting_of(spec: ServeSpec, checkpoint: Checkpoint) -> Fitting:
    """What of the model fits on the spec's one device. Raises InvalidRequest."""
    from peerd.compute.model.stored_as import has_grids
    from peerd.compute.quantized.formats import PACKED, QUANTIZATIONS
    from peerd.protocol.encoding.tensors import DTYPE_NAMES
    from peerd.spans.budget import dtype_of, given_bytes_of, quantization_of

    default = quantization_of(spec, checkpoint)
    # What is no choice for this model or this device is no row.
    can_pack = spec.device == "cpu" and has_grids(checkpoint)
    ways = [way for way in QUANTIZATIONS if way != PACKED or can_pack]
    return Fitting(
        model=checkpoint.name,
        block_count=checkpoint.block_count,
        device=spec.device,
        dtype=DTYPE_NAMES[dtype_of(spec, checkpoint)],
        given_bytes=given_bytes_of(spec),
        is_limited=spec.memory_bytes is not None,
        fits=tuple(_fit(replace(spec, quantize=way), checkpoint, is_default=way == default) for way in ways),
    )


def _fit(spec: ServeSpec, checkpoint: Checkpoint, *, is_default: bool) -> Fit:
    from peerd.compute.engine.capacity import block_bytes
    from peerd.compute.errors import UnusablePackageError
    from peerd.spans.budget import dtype_of, how_many_blocks, kv_tokens_of, memory_budget, quantization_of

    way = str(spec.quantize)
    try:
        one = block_bytes(checkpoint, dtype_of(spec, checkpoint), quantization_of(spec, checkpoint))
        count = how_many_blocks(spec, checkpoint)
        tokens = kv_tokens_of(spec, checkpoint, Span(0, count))
    except (CallerError, UnusablePackageError) as error:
        return Fit(quantize=way, is_default=is_default, problem=str(error))
    total = memory_budget(spec, checkpoint, count).total(tokens, on_host=spec.device == "cpu")
    return Fit(quantize=way, is_default=is_default, count=count, block_bytes=one, kv_tokens=tokens, total_bytes=total)
