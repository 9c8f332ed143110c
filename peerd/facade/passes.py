"""Forward passes through remote blocks without a cache, with gradients.

Transformers gives padded rows, `[rows, columns, width]`; a pass takes packed rows with their own lengths. Its hops keep
memory until the backward, or until the autograd graph that needs it is garbage.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from peerd.client.training.trained import Gradients
from peerd.compute.adapters.lora import BlockModule
from peerd.facade.backend import AnyPass, Backend
from peerd.facade.blocks import Call
from peerd.facade.lora import LoraTensors
from peerd.protocol.span import Span


def run_pass(
    backend: Backend, call: Call, span: Span, hidden: torch.Tensor, lora: dict[BlockModule, LoraTensors]
) -> torch.Tensor:
    """Run `hidden` `[rows, columns, width]` through `span`; padding columns of the result are zeros."""
    rows, columns, width = hidden.shape
    mask, lengths = _segments(call, rows, columns)
    if not lengths:
        raise ValueError("every position is masked: attention_mask is 1 where a token is real")
    packed = hidden[mask] if mask is not None else hidden.reshape(-1, width)
    prefix, deep = prompts_of(backend, call, span)
    cached = None if call.cache is None else call.cache.prefix
    if cached is not None:
        check_alone(prefix)
        if len(lengths) > rows:
            raise ValueError("position_ids of several sequences in a row, behind a prefix: give each a row of its own")
        prefix = cached.space(width).to(hidden)
    if prefix is not None:
        pieces = torch.split(packed, lengths)
        packed = torch.cat([part for piece in pieces for part in (prefix.to(packed), piece)])
    extra = 0 if prefix is None else len(prefix)
    beside = _Beside(deep, lora, {} if cached is None else cached.within(span))
    output = _differentiable(backend, span, packed, [length + extra for length in lengths], beside)
    if extra:
        pieces = torch.split(output, [length + extra for length in lengths])
        output = torch.cat([piece[extra:] for piece in pieces])
    if mask is None:
        return output.view(rows, columns, width)
    if call.last_only and call.is_last and len(lengths) == rows:
        # The last column's logits are wanted: those of each row's last real position, even where padding follows it.
        last = torch.stack([part[-1] for part in torch.split(output, lengths)])[:, None]
        return torch.cat((torch.zeros_like(hidden)[:, :-1], last.to(hidden)), 1)
    return torch.zeros_like(hidden).masked_scatter(mask[..., None].to(hidden.device), output.to(hidden))


def check_alone(prompts: torch.Tensor | None) -> None:
    """Raise NotImplementedError if a model with prompts of its own is given a cache with a prefix."""
    if prompts is not None:
        raise NotImplementedError("prompts of tuning_mode and a prefix of keys and values: train one of them")


def prompts_of(backend: Backend, call: Call, span: Span) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The prompts before the rows of a decoder's forward, and those of its blocks, `[blocks, 1, P, width]`.

    Raises NotImplementedError if something reads values between blocks: it would not see the prompts' positions.
    """
    prompts = backend.prompts
    if prompts is None or not call.has_prompts:
        return None, None
    if len(call.runs) != 1 or span.start:
        raise NotImplementedError(
            "prompts of tuning_mode run through all blocks at once: leave out output_hidden_states, hooks and modules"
            " between blocks, or use peft's PromptTuningConfig, whose prompts are part of the input"
        )
    return prompts.prefix, None if prompts.deep is None else prompts.deep[span.start : span.end, None]


def _segments(call: Call, rows: int, columns: int) -> tuple[torch.Tensor | None, list[int]]:
    """Which columns are real (None: all), and the lengths of the sequences in them.

    Where position ids begin again at 0 within a row, another sequence begins: several were packed into one row. Raises
    ValueError for position ids with gaps.
    """
    mask = None if call.mask is None else call.mask[:, -columns:].cpu()
    if mask is not None and bool(mask.all()):
        mask = None
    lengths = [columns] * rows if mask is None else [int(length) for length in mask.sum(1)]
    if call.positions is not None and columns > 1:
        positions = call.positions.expand(rows, -1).cpu()
        flat = positions.reshape(-1) if mask is None else positions[mask]
        lengths = [length for part in torch.split(flat, lengths) for length in _sequences(part)]
    return mask, [length for length in lengths if length]


def _sequences(positions: torch.Tensor) -> list[int]:
    """The lengths of the sequences that one row's position ids describe."""
    breaks = (positions[1:] != positions[:-1] + 1).nonzero()[:, 0] + 1
    starts = [0, *(int(start) for start in breaks), len(positions)]
    if any(int(positions[start]) != 0 for start in starts[1:-1]):
        raise ValueError("position_ids with gaps: servers count the positions of a row themselves; leave them out")
    return [end - start for start, end in itertools.pairwise(starts)]


@dataclass(frozen=True, slots=True, eq=False)
class _Beside:
    """What acts beside a span's weights: deep prompts, LoRA pairs, and prefixes by block."""

    deep: torch.Tensor | None
    lora: dict[BlockModule, LoraTensors]
    prefixes: dict[int, tuple[torch.Tensor, torch.Tensor]]

    @property
    def matrices(self) -> list[torch.Tensor]:
        """LoRA's and the prefixes', two by two."""
        return [each for pair in self.lora.values() for each in (pair.a, pair.b)] + [
            each for pair in self.prefixes.values() for each in pair
        ]

    def wire(self, matrices: Sequence[torch.Tensor]) -> dict[str, Any]:
        """`matrices` as arguments of a pass."""
        pairs = [(_wire(a), _wire(b)) for a, b in zip(matrices[::2], matrices[1::2], strict=True)]
        count = len(self.lora)
        return {
            "lora": dict(zip(self.lora, pairs[:count], strict=True)),
            "prefixes": dict(zip(self.prefixes, pairs[count:], strict=True)),
        }


def _differentiable(
    backend: Backend, span: Span, packed: torch.Tensor, lengths: Sequence[int], beside: _Beside
) -> torch.Tensor:
    deep, matrices = beside.deep, beside.matrices
    leaves = [packed, *matrices] if deep is None else [packed, deep, *matrices]
    keep = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    backend.passes += 1
    apply: Any = _Through.apply
    result: torch.Tensor = apply(backend, span, lengths, beside, keep, deep, packed, *matrices)
    return result


class _Held:
    """A pass whose hops keep memory until its backward, or until this object is garbage.

    It holds the backend, so that a program that keeps only its loss can still go back.
    """

    def __init__(self, backend: Backend, done: AnyPass) -> None:
        self._backend, self._done = backend, done
        finalizer = weakref.finalize(self, backend.bridge.post, done.close)
        finalizer.atexit = False

    def backward(self, grad: torch.Tensor) -> Gradients:
        return self._backend.bridge.call(self._done.backward, grad)


def _wire(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return tensor.detach().to("cpu", dtype)


class _Through(torch.autograd.Function):
    """Packed rows through blocks of the swarm, as one node of the autograd graph."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        span: Span,
        lengths: Sequence[int],
        beside: _Beside,
        keep: bool,
        deep: torch.Tensor | None,
        packed: torch.Tensor,
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        ask: Any = partial(
            backend.blocks.forward,
            _wire(packed, backend.dtype),
            rows=lengths,
            blocks=span,
            prompts=None if deep is None else _wire(deep),
            keep=keep,
            **beside.wire(matrices),
        )
        done: AnyPass = backend.bridge.call(ask)
        ctx.held = _Held(backend, done) if keep else None
        ctx.pairs, ctx.prefixes = tuple(beside.lora), tuple(beside.prefixes)
        ctx.likes = [None if tensor is None else (tensor.device, tensor.dtype) for tensor in (deep, packed, *matrices)]
        output: torch.Tensor = done.output.to(packed.device, packed.dtype)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        held, ctx.held = ctx.held, None
        if held is None:
            raise RuntimeError(
                "a second backward through remote blocks: run forward again, servers keep a pass for one"
            )
        found = held.backward(_wire(grad))
        pairs = [found.lora[key] for key in ctx.pairs] + [found.prefixes[block] for block in ctx.prefixes]
        matrices = [each for pair in pairs for each in pair]
        gradients = []
        for like, gradient in zip(ctx.likes, (found.prompts, found.hidden, *matrices), strict=True):
            gradients.append(None if like is None or gradient is None else gradient.to(*like))
        return (None, None, None, None, None, *gradients)
