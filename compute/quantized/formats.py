"""How a matrix is stored in eight or four bits a value: packing, unpacking, and products.

`int8` is LLM.int8's format with one scale a row. `nf4` is QLoRA's: a scale for every 64 values of the flat matrix, and
16 levels. Both quantize weights only; activations stay as they are. bitsandbytes would also round activations to int8,
and choose outlier columns from the whole batch, so one session's rows would change the results of the others.

Matrices are processed in runs of rows, so that no second copy of a whole matrix is ever made. bitsandbytes itself
behaves differently by device and shape: its int8 kernel for CUDA takes fp16 only, and its CPU kernel for nf4 uses wrong
scales for matrices whose rows do not end on a scale's border. So int8 is computed here, bit for bit as bitsandbytes
does on the CPU, and nf4 matrices are given to bitsandbytes as flat runs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from peerd.compute.device.has_triton import has_kernel
from peerd.compute.quantized.bitsandbytes_import import load_bitsandbytes

NONE = "none"
#: As the checkpoint stores them: integers in groups stay what they are (groups.py), and all else stays plain.
PACKED = "packed"
# A run that stays in a core's cache is read back for the product at once, so decoding costs no more than with plain
# weights (4096 x 4096, fp32, one core: 4 ms a row; plain 3 to 7 ms; the whole matrix at once 33 ms).
RUN_VALUES_CPU = 1 << 19
# On a GPU each run costs launches. This limits what is dequantized beside the weights to 128 MiB.
RUN_VALUES_GPU = 1 << 26


class Storage(ABC):
    """One way to store matrices. Values and scales are flat tensors."""

    name: ClassVar[str]
    values_dtype: ClassVar[torch.dtype]
    scales_dtype: ClassVar[torch.dtype] = torch.float32

    @abstractmethod
    def ends(self, rows: int, columns: int) -> tuple[int, int]:
        """How many entries of values and of scales a matrix takes."""

    def n_bytes(self, rows: int, columns: int) -> int:
        """How many bytes a matrix takes."""
        values, scales = self.ends(rows, columns)
        return values * self.values_dtype.itemsize + scales * self.scales_dtype.itemsize

    def empty(
        self, shape: tuple[int, int], device: torch.device, *, count: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for the values and scales of `count` matrices, `[count, entries]` each."""
        values, scales = self.ends(*shape)
        return (
            torch.empty(count, values, dtype=self.values_dtype, device=device),
            torch.empty(count, scales, dtype=self.scales_dtype, device=device),
        )


class Format(Storage):
    """A way to store matrices in which a run of rows is a run of values and a run of scales."""

    @abstractmethod
    def step(self, columns: int) -> int:
        """Runs must start at multiples of this many rows."""

    @abstractmethod
    def pack(self, run: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
        """Store `run`, fp32 `[rows, columns]`, into `values` and `scales`, which have exactly its size."""

    @abstractmethod
    def unpack(
        self, values: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        """Dequantize to `[rows, columns]`."""

    def has_cpu_kernel(self, columns: int, dtype: torch.dtype) -> bool:
        """Whether the CPU has a product of values as they are stored, which is faster than converting them for some
        numbers of rows (`product_choice.py`).
        """
        return False

    def linear(
        self, x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, rows: int, *, kernel_rows: int = 0
    ) -> torch.Tensor:
        """Multiply `x`, `[n, columns]`, by the run's transpose: `[n, rows]`; by the CPU's kernel up to so many rows."""
        return F.linear(x, self.unpack(values, scales, (rows, x.shape[1]), x.dtype))

    def product_of_few(
        self, x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, rows: int
    ) -> torch.Tensor | None:
        """Multiply `x` by a whole matrix, which is read once as it is stored; None if there is no kernel for so many
        rows.
        """
        return None

    def runs(self, rows: int, columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
        """The runs of rows, as (start, end), in which a matrix is processed."""
        step = self.step(columns)
        most = RUN_VALUES_CPU if device.type == "cpu" else RUN_VALUES_GPU
        size = max(1, most // (columns * step)) * step
        for start in range(0, rows, size):
            yield start, min(start + size, rows)


class Int8(Format):
    """One byte a value, and an fp32 scale a row: the row's largest magnitude, which stands for 127."""

    name = "int8"
    values_dtype = torch.int8

    def ends(self, rows: int, columns: int) -> tuple[int, int]:
        return rows * columns, rows

    def step(self, columns: int) -> int:
        return 1

    def pack(self, run: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
        largest = run.abs().amax(1)
        # The clamp is for rows of zeros: below it the quotient would overflow.
        scaled = run * (127.0 / largest.clamp(min=1e-30))[:, None]
        values.view(run.shape).copy_(scaled.round_())
        scales.copy_(largest)

    def unpack(
        self, values: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        return (values.view(shape) * (scales / 127.0)[:, None]).to(dtype)

    def has_cpu_kernel(self, columns: int, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16 and not columns % INT8_STRIDE

    def linear(
        self, x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, rows: int, *, kernel_rows: int = 0
    ) -> torch.Tensor:
        if x.dtype == torch.float16:
            # In fp16, sums of values that are not scaled yet would overflow.
            return super().linear(x, values, scales, rows)
        weights, gains = values.view(rows, x.shape[1]), (scales / 127.0).to(x.dtype)
        if 0 < len(x) <= kernel_rows and x.device.type == "cpu" and self.has_cpu_kernel(x.shape[1], x.dtype):
            product: torch.Tensor = torch._weight_int8pack_mm(x, weights, gains)
            return product
        # Integers up to 127 are exact in every dtype. Scaling the result rounds once; scaling the weights would round
        # each.
        return F.linear(x, weights.to(x.dtype)).mul_(gains)

    def product_of_few(
        self, x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, rows: int
    ) -> torch.Tensor | None:
        if not _has_kernel_for(x):
            return None
        from peerd.compute.quantized.kernel import int8_product

        return int8_product(x, values, scales, rows)


# Torch's own product of bf16 and int8 does not check widths, and reads past the end of rows that end within one of its
# vectors.
INT8_STRIDE = 64


class Nf4(Format):
    """Half a byte a value, and an fp32 scale for every 64 values."""

    name = "nf4"
    values_dtype = torch.uint8
    #: bitsandbytes' own default.
    group: ClassVar[int] = 64

    def ends(self, rows: int, columns: int) -> tuple[int, int]:
        count = rows * columns
        return -(-count // 2), -(-count // self.group)

    def step(self, columns: int) -> int:
        # The least number of rows after which a group ends.
        step = self.group
        while step % 2 == 0 and (step // 2 * columns) % self.group == 0:
            step //= 2
        return step

    def pack(self, run: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
        load_bitsandbytes()
        packed, largest = torch.ops.bitsandbytes.quantize_4bit(run.reshape(-1), self.group, self.name, torch.uint8)
        values.copy_(packed.reshape(-1))
        scales.copy_(largest)

    def unpack(
        self, values: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        load_bitsandbytes()
        # Always flat (see the module's docstring), and whole bytes.
        flat = torch.ops.bitsandbytes.dequantize_4bit(values, scales, self.group, self.name, [2 * len(values)], dtype)
        result: torch.Tensor = flat.reshape(-1)[: math.prod(shape)].view(shape)
        return result

    def linear(
        self, x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, rows: int, *, kernel_rows: int = 0
    ) -> torch.Tensor:
        if x.device.type == "cpu" or x.shape[1] % self.group:
            return super().linear(x, values, scales, rows)
        package = load_bitsandbytes()
        state: Any = package.functional.QuantState(
            absmax=scales,
            shape=torch.Size((rows, x.shape[1])),
            code=_levels(x.device),
            blocksize=self.group,
            quant_type=self.name,
            dtype=x.dtype,
        )
        product: torch.Tensor = package.matmul_4bit(x, values.view(-1, 1).t(), state)
        return product

    def product_of_few(
        self, x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, rows: int
    ) -> torch.Tensor | None:
        if x.shape[1] % self.group or not _has_kernel_for(x):
            return None
        from peerd.compute.quantized.kernel import nf4_product

        return nf4_product(x, values, scales, _levels(x.device), rows)


def _has_kernel_for(x: torch.Tensor) -> bool:
    """Whether `x` has as few rows as a decode, and is on a GPU for which Triton can compile."""
    if x.device.type != "cuda" or not has_kernel():
        return False
    from peerd.compute.quantized.kernel import MOST_ROWS

    return len(x) <= MOST_ROWS


@cache
def _levels(device: torch.device) -> torch.Tensor:
    levels: torch.Tensor = load_bitsandbytes().functional.get_4bit_type("nf4", device=device)
    return levels


FORMATS: Mapping[str, Format] = MappingProxyType({form.name: form for form in (Int8(), Nf4())})
#: The values that `--quantize` takes.
QUANTIZATIONS = (NONE, *FORMATS, PACKED)
