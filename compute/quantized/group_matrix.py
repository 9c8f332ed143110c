"""A matrix of packed integers in groups, multiplied by torch's kernel or by slices that are dequantized on the way.

The kernel reads the packed weights once for a few rows of activations, and so takes a fraction of a plain product's
time; its work grows with every row. A slice is dequantized once for all rows, and then multiplied as plain numbers. So
few rows go to the kernel, many to slices; from where on, and whether slices are faster in bfloat16, depends on the CPU
(product_choice.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from peerd.compute.quantized.formats import RUN_VALUES_CPU, RUN_VALUES_GPU
from peerd.compute.quantized.groups import (
    KERNEL,
    ROWS_STEP,
    CodeRows,
    GroupForm,
    has_kernel,
    padded_rows,
)
from peerd.compute.quantized.matrix import StoredMatrix

# What one row weighs in the two planes of 8 bits.
_HIGH = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """How matrices of one shape are multiplied: by the kernel up to `kernel_rows` rows, and else by slices.

    in_bf16: whether slices are multiplied in bfloat16, whatever the dtype of the activations.
    """

    kernel_rows: int
    in_bf16: bool = False


# Until it is measured. On all CPUs that we saw, the kernel was faster up to here.
_UNMEASURED = Choice(kernel_rows=8)


class GroupMatrix(StoredMatrix):
    """A matrix in a `GroupForm`, on the CPU; on another device it is multiplied by slices."""

    def __init__(
        self,
        form: GroupForm,
        values: torch.Tensor,
        scales: torch.Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *,
        transposed: bool = False,
    ) -> None:
        super().__init__(shape, dtype, transposed=transposed)
        self.form = form
        self.planes, self.scales = form.split(values, scales, self.columns)
        self.has_kernel = values.device.type == "cpu" and has_kernel(form.group)
        # The kernel is called some hundred times a token, so that what it needs lies ready.
        self._group = form.group
        self._low = self.planes[0]
        self._high = self.planes[1] if form.planes == 2 else None
        self._is_padded = padded_rows(self.rows) != self.rows
        self.choice = _UNMEASURED

    def __repr__(self) -> str:
        return f"<GroupMatrix {self.form!r} [{self.rows}, {self.columns}] on {self.planes.device}>"

    @property
    def choice(self) -> Choice:
        """How it is multiplied."""
        return self._choice

    @choice.setter
    def choice(self, choice: Choice) -> None:
        self._choice = choice
        self._kernel_rows = choice.kernel_rows if self.has_kernel else 0

    def store(self, weight: torch.Tensor) -> None:
        """Round `weight` to the format's grid."""
        weight = weight.t() if self.transposed else weight
        for start, end in self._runs():
            run = weight[start : min(end, self.rows)].to(self.planes.device, torch.float32).contiguous()
            self.form.write(self.planes, self.scales, start, self.form.nearest(run))

    def store_codes(self, source: CodeRows) -> None:
        """Store a matrix that is already in groups. Raises what reading it raises."""
        for start, end in self._runs():
            self.form.write(self.planes, self.scales, start, source.read(start, min(end, self.rows)))

    def dequantize(self) -> torch.Tensor:
        whole = torch.empty(self.rows, self.columns, dtype=self.dtype, device=self.planes.device)
        for start, end in self._runs():
            last = min(end, self.rows)
            whole[start:last] = self._slice(start, end, self.dtype).t()[: last - start]
        return whole.t() if self.transposed else whole

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.columns)
        if 0 < flat.shape[0] <= self._kernel_rows:
            result = self.by_kernel(flat)
        else:
            in_bf16 = self._choice.in_bf16 or x.dtype == torch.bfloat16
            result = self.by_slices(flat, torch.bfloat16 if in_bf16 else torch.float32)
        return result.view(*x.shape[:-1], self.rows)

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        flat = gradient.reshape(-1, self.rows).float()
        total = flat.new_zeros(len(flat), self.columns)
        for start, end in self._runs():
            own = flat[:, start:end]
            total.addmm_(own, self._slice(start, end, torch.float32).t()[: own.shape[1]])
        return total.to(gradient.dtype).view(*gradient.shape[:-1], self.columns)

    def by_kernel(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply `[n, columns]` to `[n, rows]` by torch's kernel, which rounds them and the result to bfloat16."""
        assert KERNEL is not None
        rounded = x.to(torch.bfloat16)
        result = KERNEL(rounded, self._low, self._group, self.scales)
        if self._high is not None:
            high = KERNEL(rounded, self._high, self._group, self.scales)
            result = torch.add(result.float(), high, alpha=_HIGH)
        if self._is_padded:
            result = result[:, : self.rows].contiguous()
        return result.to(x.dtype)

    def by_slices(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Multiply `[n, columns]` to `[n, rows]` in `dtype`."""
        result, inputs = x.new_empty(len(x), self.rows), x.to(dtype)
        for start, end in self._runs():
            own = result[:, start:end]
            own.copy_((inputs @ self._slice(start, end, dtype))[:, : own.shape[1]])
        return result

    def _slice(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows `start` to `end - 1` as `[columns, rows]`."""
        return self.form.read(self.planes, self.scales, start, end, dtype)

    def _runs(self) -> Iterator[tuple[int, int]]:
        """The runs of rows, as (start, end), in which the matrix is processed. They cover the padding too."""
        most = RUN_VALUES_CPU if self.planes.device.type == "cpu" else RUN_VALUES_GPU
        size = max(1, most // (self.columns * ROWS_STEP)) * ROWS_STEP
        padded = padded_rows(self.rows)
        for start in range(0, padded, size):
            yield start, min(start + size, padded)
