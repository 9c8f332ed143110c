"""Moves tensors between host and device for one batch at a time: pinned buffers, a CUDA stream of its own, one wait.

On CUDA a copy from ordinary memory makes the host wait for everything that the device has queued. So inputs go into
pinned memory and are copied while the device goes on. Results, and a check on the device whether they are finite, are
requested at once; then the host waits for one event. On the CPU the same calls are plain copies. Only the device thread
uses this.

A buffer may be reused only once nothing reads it. One batch runs at a time, and its results are waited for before the
next batch is staged, so everything that read these buffers has ended by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_CUDA: Any = torch.cuda


class Staging:
    """The buffers between the host and one device, for hidden states `[positions, width]` in `dtype`."""

    def __init__(self, width: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self._width = width
        self._device = device
        self._dtype = dtype
        self._is_cuda = device.type == "cuda"
        self._up = torch.empty(0, width, dtype=dtype)
        self._down = torch.empty(0, width, dtype=dtype)
        self._down_finite = torch.empty(0, dtype=torch.bool)
        # Torch has no types for streams and events.
        self._stream: Any = _CUDA.Stream(device) if self._is_cuda else None

    def gather(self, parts: Sequence[torch.Tensor], room: int = 0) -> torch.Tensor:
        """The parts one after the other, on the host, in the device's dtype, followed by zeros up to `room` rows.

        The next call overwrites the returned tensor.
        """
        count = sum(len(part) for part in parts)
        if not self._is_cuda and not room:
            return (parts[0] if len(parts) == 1 else torch.cat(tuple(parts))).to(self._dtype)
        self._up = self._at_least(self._up, max(count, room))
        offset = 0
        for part in parts:
            self._up[offset : offset + len(part)].copy_(part)
            offset += len(part)
        self._up[offset:room].zero_()
        return self._up[: max(count, room)]

    def send(self, host: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """Copy to the device, into `target` if one is given. Work that is queued after this call sees the copy.

        The copy is asynchronous if `host` is pinned; then `host` must not be changed before the batch has ended.
        """
        if self._stream is None:
            return host.to(self._device) if target is None else target.copy_(host)
        current = torch.cuda.current_stream(self._device)
        if target is None:
            target = torch.empty(host.shape, device=self._device, dtype=host.dtype)
        # Work that was queued before may still read the target.
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            target.copy_(host, non_blocking=True)
        current.wait_stream(self._stream)
        return target

    def fetch(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy the device's `[positions, width]` to the host, with one bool for each position: whether it is finite.

        Waits for the device once. The next call overwrites the returned tensors.
        """
        finite = output.isfinite().all(-1)
        if self._stream is None:
            return output, finite
        count = len(output)
        self._down = self._at_least(self._down, count)
        self._down_finite = _grown(self._down_finite, count, pin=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._down[:count].copy_(output, non_blocking=True)
            self._down_finite[:count].copy_(finite, non_blocking=True)
            done = _CUDA.Event()
            done.record(self._stream)
        # Only after the copies, which are done now, may the device reuse the memory of `output` and `finite`.
        done.synchronize()
        return self._down[:count], self._down_finite[:count]

    def _at_least(self, buffer: torch.Tensor, count: int) -> torch.Tensor:
        return _grown(buffer, count, pin=self._is_cuda)


def _grown(buffer: torch.Tensor, count: int, *, pin: bool) -> torch.Tensor:
    """A buffer of at least `count` rows: the old one if it is large enough."""
    if len(buffer) >= count:
        return buffer
    rows = max(count, 2 * len(buffer))
    return torch.empty(rows, *buffer.shape[1:], dtype=buffer.dtype, pin_memory=pin)


def upload(
    values: Sequence[int] | torch.Tensor, device: torch.device, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """Numbers as a tensor on the device, without waiting for the device."""
    host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda" or not host.numel():
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
