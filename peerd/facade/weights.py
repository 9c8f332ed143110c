"""Parameters whose values only servers have: they have a shape, a dtype and a device.

Libraries inspect a model's parameters (peft their shapes and devices, optimizers whether they are trained) far more
often than they compute with them. These parameters can be inspected, and refuse everything else, so a 70B model's
blocks take no memory here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_aten = torch.ops.aten
_SAME = (
    _aten.detach,
    _aten.clone,
    _aten.alias,
    _aten.lift_fresh,
    _aten.contiguous,
    _aten.view,
    _aten._unsafe_view,
)


class RemoteWeight(torch.Tensor):
    """A tensor without storage. Copies and conversions return another one; arithmetic raises RuntimeError."""

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> RemoteWeight:
        make: Any = torch.Tensor._make_wrapper_subclass
        made: RemoteWeight = make(cls, tuple(shape), dtype=dtype, device=device, requires_grad=False)
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"RemoteWeight({list(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> torch.Tensor:
        kwargs = kwargs or {}
        operation, this = func.overloadpacket, args[0] if args else None
        if isinstance(this, RemoteWeight):
            dtype, device = kwargs.get("dtype") or this.dtype, kwargs.get("device") or this.device
            if operation in _SAME:
                viewed = operation in (_aten.view, _aten._unsafe_view)
                shape = torch.empty(this.shape, device="meta").view(args[1]).shape if viewed else this.shape
                return cls(shape, this.dtype, this.device)
            if operation is _aten._to_copy:
                return cls(this.shape, dtype, device)
            if operation in (_aten.empty_like, _aten.zeros_like):
                return torch.zeros(this.shape, dtype=dtype, device=device)
        raise RuntimeError(
            f"{func}: this weight is on the servers of the swarm, so it cannot be used in computations here. Adapters"
            " stay beside such weights: save one with save_pretrained, and merge it into the whole model elsewhere"
        )

    def __deepcopy__(self, memo: object) -> nn.Parameter:
        return nn.Parameter(RemoteWeight(self.shape, self.dtype, self.device), requires_grad=False)


def replace_weights(module: nn.Module, device: torch.device | str = "cpu") -> None:
    """Replace all parameters and buffers of a module that was built on the meta device by RemoteWeights."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                weight = RemoteWeight(parameter.shape, parameter.dtype, device)
                child._parameters[name] = nn.Parameter(weight, requires_grad=False)
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = RemoteWeight(buffer.shape, buffer.dtype, device)
