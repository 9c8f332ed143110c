"""Computes logits from hidden states.

If the vocabulary's weights are half precision, Transformers multiplies in their dtype, which rounds logits to 8 bits in
bf16: near ties then go to the token that comes first. Here products are summed and kept in fp32. On a CPU the weights
are converted slice by slice in one small buffer, so no fp32 copy of all of them exists. For one position that costs
about as much as torch's own product; for eight, 2.5 times as much on a CPU with bf16 multiplication, and less on one
without (benchmarks/compute/lm_head_bench.py).

If only the most likely tokens are wanted, a shortlist finds them sooner, where this CPU gains by it (`shortlist`).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from threading import Barrier
from typing import Any

import torch
from torch import nn

from peerd.compute.model.shortlist import SHORTLIST, Shortlist, most_positions

# Slices that stay in a core's cache: 4 MiB was as fast as 1 and 2, and 16 MiB took twice as long.
SLICE_BYTES = 4 << 20
# A smaller matrix is multiplied sooner than threads are woken.
_WORTH_THREADS_BYTES = 16 << 20


class LmHead(nn.Module):
    """A linear map with fp32 results, whatever its weights are stored as. It shares `linear`'s weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self._shortlist: Shortlist | None = None
        self._shortlist_positions = 0
        # The head runs inside Transformers' own forward, which has no argument for this; and in several threads.
        self._most: ContextVar[int | None] = ContextVar("most", default=None)

    def make_shortlist(self) -> None:
        """Prepare for `only_best`, if this CPU gains by it: a byte for each weight. Blocks the thread."""
        weight = self.weight.detach()
        self._shortlist_positions = most_positions(weight, product)
        if self._shortlist_positions:
            self._shortlist = Shortlist.of(weight)

    @contextmanager
    def only_best(self, most: int | None) -> Iterator[None]:
        """Within the context only the best `most` logits of each position must be exact; the others may be -inf.

        None: all must be.
        """
        token = self._most.set(most)
        try:
            yield
        finally:
            self._most.reset(token)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., width] to fp32 [..., vocabulary]."""
        weight, most = self.weight, self._most.get()
        if self._shortlist is not None and most is not None and most <= SHORTLIST:
            rows = hidden.reshape(-1, hidden.shape[-1]).float()
            if len(rows) <= self._shortlist_positions:
                bias = None if self.bias is None else self.bias.float()
                best = self._shortlist.logits(rows, weight, bias, most, product)
                return best.view(*hidden.shape[:-1], len(weight))
        if weight.dtype == torch.float32:
            return nn.functional.linear(hidden, weight, self.bias)
        if weight.device.type != "cpu":
            # Other devices sum the product in fp32; only its result is rounded.
            return nn.functional.linear(hidden, weight, self.bias).float()
        apply: Any = _Product.apply
        logits: torch.Tensor = apply(hidden.reshape(-1, hidden.shape[-1]).float(), weight)
        if self.bias is not None:
            logits += self.bias.float()
        return logits.view(*hidden.shape[:-1], len(weight))


class _Product(torch.autograd.Function):
    """`_sliced_product`, whose first argument has a gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _sliced_product(hidden, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        hidden = torch.zeros(len(grad), weight.shape[1])
        for part, own in _slices(weight):
            hidden += grad[:, own] @ part
        return hidden, None


def product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product of fp32 [n, width] and transposed [vocabulary, width] on the CPU: fp32 [n, vocabulary]."""
    if weight.dtype == torch.float32:
        return nn.functional.linear(hidden, weight)
    return _sliced_product(hidden, weight)


def _sliced_product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product of fp32 [n, width] and transposed half-precision [vocabulary, width]: fp32 [n, vocabulary].

    Each thread has its own rows of the vocabulary. If torch divided each slice among its threads, they would wait for
    each other hundreds of times, for seconds in all where another process uses the cores.
    """
    vocabulary = len(weight)
    logits = torch.empty(len(hidden), vocabulary)
    threads = torch.get_num_threads()
    if threads == 1 or weight.nbytes < _WORTH_THREADS_BYTES:
        _sliced(hidden, weight, logits)
        return logits
    each = -(-vocabulary // threads)
    jobs = [
        _workers(threads).submit(_sliced, hidden, weight[start : start + each], logits[:, start : start + each])
        for start in range(0, vocabulary, each)
    ]
    for job in jobs:
        job.result()
    return logits


def _sliced(hidden: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor) -> None:
    """Write the product into `logits`, in slices of the vocabulary."""
    with torch.no_grad():
        for part, own in _slices(weight):
            logits[:, own] = hidden @ part.T


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one thread each."""
    started = Barrier(threads + 1)

    def use_one() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="peerd-head")
    for _ in range(threads):
        pool.submit(use_one)
    started.wait()
    # The number is also what threads get that begin to use torch later.
    torch.set_num_threads(threads)
    return pool


def _slices(weight: torch.Tensor) -> Iterator[tuple[torch.Tensor, slice]]:
    """The matrix in fp32, slice by slice in one buffer, each with the rows that it has."""
    vocabulary, width = weight.shape
    rows = max(1, SLICE_BYTES // (width * 4))
    buffer = torch.empty(min(rows, vocabulary), width)
    for start in range(0, vocabulary, rows):
        end = min(start + rows, vocabulary)
        yield buffer[: end - start].copy_(weight[start:end]), slice(start, end)
