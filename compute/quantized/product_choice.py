"""Measures how packed and int8 matrices are multiplied fastest on this CPU, and whether packed ones beat plain ones.

When a span is loaded, the kernel is compared for each shape with slices at some numbers of rows, on matrices of the
span itself, so many that they do not all stay in the CPU's cache. Ways are timed alternately, and the fastest turn of
each counts, because other programs disturb. The results are remembered for this CPU.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from peerd.compute.device.measurements import device_name, remembered
from peerd.compute.quantized.group_matrix import Choice, GroupMatrix
from peerd.compute.quantized.groups import GROUPS, group_form, has_kernel
from peerd.compute.quantized.matrix import QuantizedMatrix
from peerd.compute.quantized.modules import matrices_in

log = logging.getLogger(__name__)

# Some sessions that decode, many, a short prompt, and a full batch of a long one.
ROWS = (4, 16, 64, 256)
#: Stands for "any number of rows".
NO_LIMIT = 1 << 20
_TURNS = 3
# Some megabytes do not stay in a core's own cache; a full batch takes a tenth of a second for so many.
_TIMED_BYTES = 3 << 20
# Matrices that are made for a comparison with plain ones: 24 MiB of float32.
_MADE, _MADE_SIDE = 6, 1024
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
    """Set for each packed or int8 matrix inside `module` how it is multiplied. The first time it takes a second or
    two.
    """
    found = list(matrices_in(module))
    _choose_packed([matrix for matrix in found if isinstance(matrix, GroupMatrix)])
    _choose_quantized([matrix for matrix in found if isinstance(matrix, QuantizedMatrix)])


def _choose_quantized(found: Sequence[QuantizedMatrix]) -> None:
    by_shape: dict[tuple[int, int], list[QuantizedMatrix]] = {}
    for matrix in found:
        if matrix.values.device.type == "cpu" and matrix.form.has_cpu_kernel(matrix.columns, matrix.dtype):
            by_shape.setdefault((matrix.rows, matrix.columns), []).append(matrix)
    for matrices in by_shape.values():
        first = matrices[0]
        key = f"{_machine()} | {first.form.name} {first.columns}x{first.rows} {first.dtype} | rows of the kernel"
        # No zeros are remembered.
        rows = int(remembered("quantized_products", key, partial(_one_more_row, matrices))) - 1
        log.info("%d of %r: the kernel up to %d rows", len(matrices), first, rows)
        for matrix in matrices:
            matrix.kernel_rows = rows


def _one_more_row(matrices: Sequence[QuantizedMatrix]) -> float:
    return 1.0 + quantized_kernel_rows(matrices)


def quantized_kernel_rows(matrices: Sequence[QuantizedMatrix], timing: Timing = seconds_of) -> int:
    """Up to how many rows the CPU's kernel is faster than converting the values; 0: for none."""
    first = matrices[0]
    timed = matrices[: max(1, _TIMED_BYTES // first.values.nbytes)]

    def by(kernel_rows: int, x: torch.Tensor) -> Way:
        def run() -> None:
            for matrix in timed:
                matrix.kernel_rows = kernel_rows
                matrix.multiply(x)

        return run

    limit = 0
    for rows in (1, *ROWS):
        x = torch.randn(rows, first.columns, generator=torch.Generator().manual_seed(rows)).to(first.dtype)
        kernel, converted = _fastest([by(rows, x), by(0, x)], timing)
        if kernel > converted:
            break
        limit = rows
    return limit


def _choose_packed(found: Sequence[GroupMatrix]) -> None:
    by_shape: dict[tuple[int, int, int, int], list[GroupMatrix]] = {}
    for matrix in found:
        if matrix.planes.device.type == "cpu":
            key = (matrix.rows, matrix.columns, matrix.form.bits, matrix.form.group)
            by_shape.setdefault(key, []).append(matrix)
    for matrices in by_shape.values():
        choice = choice_for(matrices)
        dtype = "bfloat16" if choice.in_bf16 else "float32"
        log.info(
            "%d of %r: the kernel up to %d rows, above slices in %s",
            *(len(matrices), matrices[0], choice.kernel_rows, dtype),
        )
        for matrix in matrices:
            matrix.choice = choice


def packed_is_faster() -> bool:
    """Whether this CPU multiplies few rows faster by packed weights than by plain ones in float32.

    Torch's kernel is a plain loop on CPUs for which it was not written. Measured the first time, in a tenth of a
    second.
    """
    return (
        has_kernel(GROUPS[0])
        and remembered("packed_products", f"{_machine()} | packed over plain", packed_over_plain) < 1
    )


def packed_over_plain(timing: Timing = seconds_of) -> float:
    """The time of the kernel divided by that of plain products in float32, where that is worst."""
    random = torch.Generator().manual_seed(0)
    form, side = group_form(4, GROUPS[0]), _MADE_SIDE
    plain, packed = torch.randn(_MADE, side, side, generator=random), []
    for values, scales in zip(*form.empty((side, side), torch.device("cpu"), count=_MADE), strict=True):
        packed.append(
            GroupMatrix(form, values.random_(generator=random), scales.fill_(0.01), (side, side), plain.dtype)
        )
    ratios = []
    for rows in ROWS[:2]:
        x = torch.randn(rows, side, generator=random)
        kernel, linear = _fastest([_by_kernel(packed, x), partial(_dense, plain, x)], timing)
        ratios.append(kernel / linear)
    log.info("packed over plain weights: %s of the time at %s rows", ratios, ROWS[:2])
    return max(ratios)


def choice_for(matrices: Sequence[GroupMatrix]) -> Choice:
    """The choice for matrices of one shape, which all have the same format."""
    first = matrices[0]
    key = f"{_machine()} | {first.columns}x{first.rows} {first.form!r}"
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


def _machine() -> str:
    cpu = device_name(torch.device("cpu"))
    parts = (cpu, torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads", torch.__version__)
    return " | ".join(parts)


def _dense(weights: torch.Tensor, x: torch.Tensor) -> None:
    for weight in weights:
        F.linear(x, weight)


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
