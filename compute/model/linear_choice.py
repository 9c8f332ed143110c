"""Chooses how a span's fp32 linear layers are stored on this CPU: plain, or in oneDNN's own order.

Which is faster differs from CPU to CPU: with one row, packed weights took 0.6 of a plain product's time on one
machine and 1.3 to 1.7 of it on another. So both are timed on the span's own layers when the span is loaded, and the
result is remembered for this CPU. Two things make timing hard. A weight that stays in the CPU's cache between two
products hides the cost of reading it, so many layers run in turn, as in a model. And other programs disturb it, so
both kinds are timed alternately, and the fastest turn of each counts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from peerd.compute.device.measurements import device_name, remembered
from peerd.compute.model.packed_linear import PackedLinear

log = logging.getLogger(__name__)

# A decode of one session, of a few, and of many.
ROWS = (1, 4, 16)
_TURNS = 5
# Layers are taken until they have this many bytes, or until there are no more of this shape: enough that they are read
# from memory in each turn. Still more, to exceed a large CPU cache, would be slow to time.
_TIMED_BYTES = 96 << 20
# Packed weights must gain this much at some number of rows, and may lose at none.
_GAIN = 0.95
_NOISE = 1.02

# A packed product costs some 15 us more to call than a plain one, which a smaller weight does not win back.
_SMALLEST_WEIGHT = 1 << 17

Timing = Callable[[Sequence[nn.Module], torch.Tensor], float]


def pack_linears(module: nn.Module, pays: Callable[[Sequence[nn.Linear]], bool] | None = None) -> int:
    """Pack the large fp32 linear layers inside `module` on the CPU that are faster packed. Returns how many.

    `pays` decides for all layers of one shape; by default it is measured. Without oneDNN nothing is packed.
    """
    if not torch._C._has_mkldnn:
        return 0
    by_shape: dict[tuple[int, int], list[tuple[str, nn.Linear]]] = {}
    for name, child in module.named_modules():
        if _is_packable(name, child):
            assert isinstance(child, nn.Linear)
            by_shape.setdefault((child.in_features, child.out_features), []).append((name, child))
    packed = 0
    for found in by_shape.values():
        if (pays or pays_to_pack)([layer for _, layer in found]):
            for name, layer in found:
                module.set_submodule(name, PackedLinear(layer))
            packed += len(found)
    return packed


def _is_packable(name: str, module: nn.Module) -> bool:
    # Subclasses (quantized layers, adapters) have their own arithmetic, and attention over latents multiplies by the
    # plain weight of `kv_b_proj` itself (attention/latent.py).
    if type(module) is not nn.Linear or name.endswith("kv_b_proj"):
        return False
    weight = module.weight
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= _SMALLEST_WEIGHT


def pays_to_pack(layers: Sequence[nn.Linear]) -> bool:
    """Whether layers of one shape should be packed: no number of rows gets slower and at least one gets faster.

    Measured the first time for this CPU, shape, number of threads and release of torch: some tens of milliseconds.
    """
    first = layers[0]
    parts = (device_name(first.weight.device), f"{torch.get_num_threads()} threads", torch.__version__)
    key = " | ".join((*parts, f"{first.in_features}x{first.out_features}"))
    return remembered("linear_layouts", key, lambda: _measure(layers)) < 1.0


def _measure(layers: Sequence[nn.Linear]) -> float:
    """Packed time divided by plain time at the rows that decide; at least 1.0 if the layers should stay plain."""
    ratios = packed_over_plain(layers, sweep_seconds)
    described = ", ".join(f"{ratio:.2f} at {rows} rows" for rows, ratio in ratios.items())
    log.info("%d x %d weights, packed over plain: %s", layers[0].in_features, layers[0].out_features, described)
    if max(ratios.values()) > _NOISE or min(ratios.values()) > _GAIN:
        return max(1.0, *ratios.values())
    return min(ratios.values())


def packed_over_plain(layers: Sequence[nn.Linear], timing: Timing) -> dict[int, float]:
    """For each number of rows, packed time divided by plain time, each the fastest of several turns."""
    first = layers[0]
    timed = layers[: max(1, _TIMED_BYTES // first.weight.nbytes)]
    packed = [PackedLinear(layer) for layer in timed]
    ratios = {}
    with torch.inference_mode():
        for rows in ROWS:
            x = torch.randn(rows, first.in_features, generator=torch.Generator().manual_seed(rows))
            turns = [(timing(timed, x), timing(packed, x)) for _ in range(_TURNS)]
            plain_s, packed_s = (min(times) for times in zip(*turns, strict=True))
            ratios[rows] = packed_s / plain_s
    return ratios


def sweep_seconds(layers: Sequence[nn.Module], x: torch.Tensor) -> float:
    """The seconds that `x` `[rows, in_features]` takes through each of the layers, one after the other."""
    started = time.perf_counter()
    for layer in layers:
        layer(x)
    return time.perf_counter() - started
