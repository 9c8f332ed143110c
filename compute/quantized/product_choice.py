"""Measures, when a span is loaded, how its packed matrices are multiplied fastest on this CPU, and remembers it.

For each shape it compares the kernel with slices at some numbers of rows, on matrices of the span itself, so many that
they do not all stay in the CPU's cache. Ways are timed alternately, and the fastest turn of each counts, because other
programs disturb.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from peerd.compute.device.measurements import device_name, remembered
from peerd.compute.quantized.group_matrix import Choice, GroupMatrix
from peerd.compute.quantized.modules import matrices_in

log = logging.getLogger(__name__)

# Some sessions that decode, many, a short prompt, and a full batch of a long one.
ROWS = (4, 16, 64, 256)
#: Stands for "any number of rows".
NO_LIMIT = 1 << 20
_TURNS = 3
# Some megabytes do not stay in a core's own cache; a full batch takes a tenth of a second for so many.
_TIMED_BYTES = 3 << 20
# Results in bfloat16 are a little less exact, so they must be worth it.
_GAIN = 0.9

Way = Callable[[], object]
Timing = Callable[[Way], float]


def seconds_of(way: Way) -> float:
    """The seconds that one call takes."""
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def choose_products(module: nn.Module) -> None:
    """Set for each packed matrix inside `module` how it is multiplied. The first time it takes a second or two."""
    by_shape: dict[tuple[int, int, int, int], list[GroupMatrix]] = {}
    for matrix in matrices_in(module):
        if isinstance(matrix, GroupMatrix) and matrix.planes.device.type == "cpu":
            key = (matrix.rows, matrix.columns, matrix.form.bits, matrix.form.group)
            by_shape.setdefault(key, []).append(matrix)
    for matrices in by_shape.values():
        choice = choice_for(matrices)
        for matrix in matrices:
            matrix.choice = choice


def choice_for(matrices: Sequence[GroupMatrix]) -> Choice:
    """The choice for matrices of one shape, which all have the same format."""
    first = matrices[0]
    parts = (device_name(first.planes.device), f"{torch.get_num_threads()} threads", torch.__version__)
    key = " | ".join((*parts, f"{first.columns}x{first.rows} {first.form!r}"))
    ratio = remembered("packed_products", f"{key} | bfloat16 over float32", lambda: bf16_over_fp32(matrices))
    in_bf16 = ratio <= _GAIN
    if not first.has_kernel:
        return Choice(0, in_bf16)
    kernel_rows = remembered(
        "packed_products", f"{key} | rows of the kernel", lambda: float(rows_of_kernel(matrices, in_bf16=in_bf16))
    )
    return Choice(int(kernel_rows), in_bf16)


def bf16_over_fp32(matrices: Sequence[GroupMatrix], timing: Timing = seconds_of) -> float:
    """The time of slices in bfloat16 divided by their time in float32, for a full batch."""
    x = _input(matrices[0], ROWS[-1])
    bf16, fp32 = _fastest([_by_slices(matrices, x, dtype) for dtype in (torch.bfloat16, torch.float32)], timing)
    return bf16 / fp32


def rows_of_kernel(matrices: Sequence[GroupMatrix], *, in_bf16: bool, timing: Timing = seconds_of) -> int:
    """Up to how many rows the kernel is faster than slices: at least one, or NO_LIMIT."""
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    limit = 1
    for rows, more_rows in zip(ROWS, (*ROWS[1:], None), strict=True):
        x = _input(matrices[0], rows)
        kernel, slices = _fastest([_by_kernel(matrices, x), _by_slices(matrices, x, dtype)], timing)
        log.info("%r: at %d rows the kernel takes %.2f of the slices' time", matrices[0], rows, kernel / slices)
        if kernel > slices:
            break
        # The border lies between two numbers of rows that were measured.
        limit = math.isqrt(rows * more_rows) if more_rows is not None else NO_LIMIT
    return limit


def _by_kernel(matrices: Sequence[GroupMatrix], x: torch.Tensor) -> Way:
    return lambda: [matrix.by_kernel(x) for matrix in _timed(matrices)]


def _by_slices(matrices: Sequence[GroupMatrix], x: torch.Tensor, dtype: torch.dtype) -> Way:
    return lambda: [matrix.by_slices(x, dtype) for matrix in _timed(matrices)]


def _timed(matrices: Sequence[GroupMatrix]) -> Sequence[GroupMatrix]:
    first = matrices[0]
    return matrices[: max(1, _TIMED_BYTES // first.form.n_bytes(first.rows, first.columns))]


def _input(matrix: GroupMatrix, rows: int) -> torch.Tensor:
    return torch.randn(rows, matrix.columns, generator=torch.Generator().manual_seed(rows))


def _fastest(ways: Sequence[Way], timing: Timing) -> list[float]:
    with torch.inference_mode():
        turns = [[timing(way) for way in ways] for _ in range(_TURNS)]
    return [min(times) for times in zip(*turns, strict=True)]
