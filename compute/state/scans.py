"""Lets Mamba's scan begin with a row's state.

Transformers' scan over several positions, and the kernel that it uses where there is one, begin with a state of zeros.
The recurrence is linear in the state: h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t, and y_t = C_t h_t + D x_t, of which the
gate z takes a share. So the scan runs as it is, and what the first state adds at each position is added afterwards: its
decay is known for all positions at once. (Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State
Spaces", 2023, equations 2 and 4.)
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peerd.compute.errors import UnsupportedModelError


class ScanFrom:
    """Replaces the scan in one mixer: `initial` `[rows, channels, size]` is the state before the first position."""

    def __init__(self, scan: Callable[..., Any]) -> None:
        self._scan = scan
        #: None: zeros.
        self.initial: torch.Tensor | None = None

    def __call__(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        *,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **others: Any,
    ) -> Any:
        """Transformers' `mamba_selective_scan`: `hidden_states`, `dt` and `z` are `[rows, channels, positions]`, `A`
        is `[channels, size]`, `B` and `C` are `[rows, size, positions]`.
        """
        asked = {"z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus, **others}
        result = self._scan(hidden_states, dt, A, B, C, return_last_state=return_last_state, **asked)
        if self.initial is None:
            return result
        output, last = result if return_last_state else (result, None)
        steps = dt.float() if delta_bias is None else dt.float() + delta_bias.float()[:, None]
        passed = (F.softplus(steps) if delta_softplus else steps).cumsum(-1)
        # What is left of the first state at each position: [rows, channels, positions, size].
        left = torch.exp(A[:, None] * passed[..., None]) * self.initial[:, :, None]
        added = torch.einsum("rcps,rsp->rcp", left, C.float())
        output = output + (added if z is None else added * F.silu(z.float())).to(output.dtype)
        return (output, last + left[:, :, -1]) if last is not None else output


def scan_from(mixer: nn.Module, name: str) -> ScanFrom:
    """Make the mixer's forward call a `ScanFrom` instead of the function `name` of its file, and return it.

    Raises UnsupportedModelError if this release's forward calls no such function.
    """
    forward: Any = inspect.unwrap(type(mixer).forward)
    if name not in forward.__code__.co_names:
        raise UnsupportedModelError(f"this release of Transformers computes {type(mixer).__name__} without {name}")
    scan = ScanFrom(forward.__globals__[name])
    own = types.FunctionType(
        forward.__code__,
        forward.__globals__ | {name: scan},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    mixer.forward = types.MethodType(own, mixer)
    return scan
