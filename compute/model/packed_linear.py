"""A linear layer whose weight lies in oneDNN's own order.

A plain product may re-order the weight at every call; oneDNN can order it once. Whether that is faster depends on
the CPU (linear_choice.py measures it). The plain weight is dropped, so memory stays the same. It is unpacked, bit by
bit equal, when it is asked for, and while a gradient needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

# The order suits any number of rows; the number given for packing only has to be more than a few.
_ROWS_HINT = 16
# Kernels for fewer rows than this are slower than those for this many.
_FEWEST_ROWS = 4


class PackedLinear(nn.Module):
    """Replaces an fp32 `nn.Linear` on the CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_HINT)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    @property
    def weight(self) -> torch.Tensor:
        """The weight in its plain order, unpacked at each access: `[out_features, in_features]`."""
        return self._packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`. Gradients flow to `x`; the layer itself is frozen."""
        if torch.is_grad_enabled() and x.requires_grad:
            apply: Any = _Product.apply
            result: torch.Tensor = apply(x, self)
            return result
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`, without autograd."""
        rows = x.reshape(-1, self.in_features)
        count = rows.shape[0]
        if count == 1:
            rows = rows.expand(_FEWEST_ROWS, -1)
        elif count < _FEWEST_ROWS:
            rows = torch.cat((rows, rows))
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return result[:count].view(*x.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    """The product for autograd. Keeps neither the input, since the weight is frozen, nor a plain weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: PackedLinear) -> torch.Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.linear.weight, None
