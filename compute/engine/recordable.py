"""Finds out whether a computation can be recorded as a CUDA graph, by watching one run of it.

An operation that makes the host wait for the device cannot be recorded, and after a failed attempt torch's allocator
believes that the recording still goes on. So waiting operations are looked for before recording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# The results of these operations, or the results' shapes, depend on numbers that only the device has. The last one
# makes a tensor from a host's number, which is copied in the middle of the computation.
_WAITING = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten._unique",
    "aten.unique",
    "aten.masked_select",
    "aten.repeat_interleave.Tensor",
    "aten.lift_fresh",
)


class WaitWatcher(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types no modes
    """Inside this context, `seen` gathers the names of operations for which the host waits."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        _types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = str(function)
        self.seen |= {waiting for waiting in _WAITING if name.startswith(waiting)}
        result = function(*args, **(kwargs or {}))
        if name.startswith(("aten._to_copy", "aten.copy_")) and _crosses(result, args):
            self.seen.add(f"{name} between devices")
        return result


def _crosses(result: Any, args: tuple[Any, ...]) -> bool:
    """Whether a copy went from the host to a device or back."""
    places = {value.device.type for value in (result, *args) if isinstance(value, torch.Tensor)}
    return len(places) > 1
