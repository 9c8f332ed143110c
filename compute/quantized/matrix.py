"""A quantized matrix that can be used in products like a plain one, and is never dequantized as a whole for them.

It implements the ways in which torch asks for such a product; a format defines how the matrix is stored. Weights are
frozen: gradients flow to the other factor only, and the backward dequantizes again instead of keeping what the forward
dequantized.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from peerd.compute.quantized.formats import Format


class StoredMatrix(ABC):
    """A matrix `[rows, columns]` of a linear layer `x @ matrix.T`, stored in some format.

    With `transposed` the model computes `x @ matrix`, as Transformers' experts of some families do. It is then stored
    transposed, so that a stored row always makes one output. `dtype` is the dtype of what `dequantize` returns.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, *, transposed: bool) -> None:
        self.rows, self.columns = shape
        self.dtype = dtype
        self.transposed = transposed

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is F.linear:
            return _linear(*args, **(kwargs or {}))
        if function in _MATMULS and isinstance(args[1], cls):
            return args[1].matmul_from_left(args[0])
        return NotImplemented

    @abstractmethod
    def store(self, weight: torch.Tensor) -> None:
        """Store the values of `weight`, which has the shape that the model sees, on any device and in any dtype."""

    @abstractmethod
    def dequantize(self) -> torch.Tensor:
        """The whole matrix, in the shape that the model sees."""

    @abstractmethod
    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """`product` without autograd."""

    @abstractmethod
    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the input of `multiply`, from the gradient of its result."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply `x`, `[..., columns]`, to `[..., rows]`, also for a transposed matrix. Differentiable in `x`."""
        if torch.is_grad_enabled() and x.requires_grad:
            apply: Any = _Product.apply
            result: torch.Tensor = apply(x, self)
            return result
        return self.multiply(x)

    def matmul_from_left(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ matrix`. Raises TypeError unless the matrix is transposed."""
        if not self.transposed:
            raise TypeError("this matrix is meant for F.linear: x @ matrix would sum over its outputs")
        return self.product(x)


class QuantizedMatrix(StoredMatrix):
    """A matrix as values and scales of a format whose runs of rows can be packed and unpacked."""

    def __init__(
        self,
        form: Format,
        values: torch.Tensor,
        scales: torch.Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *,
        transposed: bool = False,
    ) -> None:
        super().__init__(shape, dtype, transposed=transposed)
        self.form = form
        self.values = values
        self.scales = scales
        #: Up to how many rows the CPU's own kernel multiplies; `product_choice.choose_products` sets it.
        self.kernel_rows = 0

    def __repr__(self) -> str:
        return f"<QuantizedMatrix {self.form.name} [{self.rows}, {self.columns}] on {self.values.device}>"

    def store(self, weight: torch.Tensor) -> None:
        weight = weight.t() if self.transposed else weight
        device = self.values.device
        for start, end in self.form.runs(self.rows, self.columns, device):
            values, scales = self._stored(start, end)
            self.form.pack(weight[start:end].to(device, torch.float32).contiguous(), values, scales)

    def dequantize(self) -> torch.Tensor:
        whole = torch.empty(self.rows, self.columns, dtype=self.dtype, device=self.values.device)
        for start, end in self.form.runs(self.rows, self.columns, whole.device):
            whole[start:end] = self._unpack(start, end, self.dtype)
        return whole.t() if self.transposed else whole

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.columns)
        few = self.form.product_of_few(flat, self.values, self.scales, self.rows)
        if few is not None:
            return few.view(*x.shape[:-1], self.rows)
        runs = list(self.form.runs(self.rows, self.columns, self.values.device))
        if len(runs) == 1:
            result = self.form.linear(flat, self.values, self.scales, self.rows, kernel_rows=self.kernel_rows)
        else:
            result = flat.new_empty(len(flat), self.rows)
            for start, end in runs:
                values, scales = self._stored(start, end)
                result[:, start:end] = self.form.linear(flat, values, scales, end - start, kernel_rows=self.kernel_rows)
        return result.view(*x.shape[:-1], self.rows)

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        flat = gradient.reshape(-1, self.rows)
        # This adds up over runs, so it is in fp32 whatever the dtype.
        total = flat.new_zeros(len(flat), self.columns, dtype=torch.float32)
        for start, end in self.form.runs(self.rows, self.columns, self.values.device):
            total += flat[:, start:end] @ self._unpack(start, end, flat.dtype)
        return total.to(gradient.dtype).view(*gradient.shape[:-1], self.columns)

    def _unpack(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        return self.form.unpack(*self._stored(start, end), (end - start, self.columns), dtype)

    def _stored(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, last = self.form.ends(start, self.columns), self.form.ends(end, self.columns)
        return self.values[first[0] : last[0]], self.scales[first[1] : last[1]]


class _Product(torch.autograd.Function):
    """Keeps a reference to the quantized matrix; autograd by itself would keep everything that was dequantized."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: StoredMatrix) -> torch.Tensor:
        ctx.matrix = matrix
        return matrix.multiply(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        matrix: StoredMatrix = ctx.matrix
        return matrix.multiply_back(gradient), None


def _linear(input: torch.Tensor, weight: StoredMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Implements `F.linear`."""
    if weight.transposed:
        raise TypeError("this matrix is meant for x @ matrix: F.linear would sum over its outputs")
    result = weight.product(input)
    return result if bias is None else result + bias


_MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
