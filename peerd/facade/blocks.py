"""Decoder layers that run on servers.

The decoder stays the architecture's own, with its own forward, and its layers keep their names and shapes, so that peft
finds what it adapts. Consecutive layers form a *run* if nothing reads the values between them: the first layer of a run
sends hidden states through the whole run's span, and the others return their input. A foreign module between layers, a
user's forward hook, or `output_hidden_states` ends a run. This one rule covers slices, modules between blocks, steering
and early exits, and a plain forward is one pass or one step.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from peerd.facade.cache import RemoteCache, RunKey
from peerd.facade.inputs import check_slice_mask
from peerd.facade.weights import RemoteWeight, replace_weights
from peerd.protocol.span import Span

# Transformers' own hook, which records outputs. Once needed, it stays on a layer for good.
_CAPTURING_HOOK = "output_capturing_hook"


@dataclass(eq=False, slots=True)
class Call:
    """One forward of the decoder, or of a slice of its blocks: what blocks need to know beside hidden states."""

    #: In the order in which their first blocks will be called.
    runs: tuple[Span, ...]
    #: Which columns are real, bool `[rows, all columns]`; None: all of them.
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    cache: RemoteCache | None = None
    #: Whether only each row's last position is needed from the last run.
    last_only: bool = False
    #: Whether this is a forward of the decoder, which has the trained prompts, and not one of a slice.
    has_prompts: bool = False
    #: Whether blocks return their input, to find out how a decoder calls its layers.
    is_dry: bool = False
    #: How many runs have begun, and how many blocks of the newest run are still to be called.
    begun: int = 0
    ahead: int = 0
    #: How many runs have answered.
    answered: int = 0

    def begin(self, block: int) -> Span | None:
        """The run that begins with this block, or None inside a run. Raises RuntimeError if another block was next."""
        if self.ahead:
            expected = self.runs[self.begun - 1].end - self.ahead
            self.ahead -= 1
            span = None
        else:
            span = self.runs[self.begun] if self.begun < len(self.runs) else None
            expected = -1 if span is None else span.start
            self.begun += 1
            self.ahead = 0 if span is None else len(span) - 1
        if block != expected:
            raise RuntimeError(
                f"block {block} was called where {expected} was next: remote blocks run in the order of the list;"
                " switch off layerdrop, which skips layers at random"
            )
        return span

    @property
    def run_key(self) -> RunKey:
        """The run that began last, by its number and span: two runs of one forward may have the same span."""
        return self.begun - 1, self.runs[self.begun - 1]

    @property
    def is_last(self) -> bool:
        """Whether the run that began last is the last of the forward."""
        return self.begun == len(self.runs)


class Runs(Protocol):
    """Runs a span for its blocks."""

    def run(self, call: Call, span: Span, hidden: torch.Tensor) -> torch.Tensor:
        """Run `[rows, columns, width]` through `span`."""


_local = threading.local()


def _stack() -> list[Call | None]:
    stack: list[Call | None] | None = getattr(_local, "calls", None)
    if stack is None:
        stack = _local.calls = []
    return stack


def push(call: Call | None) -> None:
    """Begin a forward in this thread: its blocks see `call` until `pop`."""
    _stack().append(call)


def pop() -> None:
    """End this thread's newest forward."""
    if stack := _stack():
        stack.pop()


@contextmanager
def during(call: Call) -> Iterator[None]:
    """Inside this context, `call` is this thread's forward."""
    push(call)
    try:
        yield
    finally:
        pop()


class RemoteBlock:
    """Mixin of a decoder layer's class. `index` is the block's number in the model.

    others: how many values the decoder expects in a tuple behind the hidden states; None if it expects no tuple.
    """

    index: int
    swarm: Runs
    others: int | None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Send `[rows, columns, width]` through the run that begins here, or return it unchanged inside a run."""
        stack = _stack()
        call = stack[-1] if stack else None
        if call is None:
            call = Call((Span(self.index, self.index + 1),))
        span = None if call.is_dry else call.begin(self.index)
        output = hidden_states if span is None else self.swarm.run(call, span, hidden_states)
        return output if self.others is None else (output, *(None,) * self.others)


class RemoteBlocks(nn.ModuleList):
    """The decoder's list of layers. The list and its slices can be called: `model.model.layers[3:7](hidden)`."""

    def __getitem__(self, index: Any) -> Any:
        """A block, or a list of some of them. Decoders take all of them at every token, for which no list is made."""
        if isinstance(index, slice) and index.indices(len(self)) == (0, len(self), 1):
            return self
        return super().__getitem__(index)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Run `[rows, columns, width]` through the list's blocks. `attention_mask` `[rows, columns]` is 1 for real
        positions.
        """
        check_slice_mask(attention_mask, hidden_states)
        runs = plan_runs(list(self))
        mask = None if attention_mask is None else attention_mask.bool()
        with during(Call(tuple(runs), mask)):
            for layer in self:
                output = layer(hidden_states)
                hidden_states = output[0] if isinstance(output, tuple) else output
        return hidden_states


def plan_runs(layers: Sequence[nn.Module], read_before: Collection[int] = ()) -> list[Span]:
    """The spans of consecutive remote blocks among `layers`, cut where something reads the values between two blocks.

    read_before: the places in `layers` whose inputs the caller reads.
    """
    runs: list[Span] = []
    joins = False
    for place, layer in enumerate(layers):
        if not isinstance(layer, RemoteBlock):
            joins = False
            continue
        is_read = place in read_before or _is_watched_before(layer)
        if joins and runs[-1].end == layer.index and not is_read:
            runs[-1] = Span(runs[-1].start, layer.index + 1)
        else:
            runs.append(Span(layer.index, layer.index + 1))
        joins = not is_watched_after(layer)
    return runs


def is_watched_after(layer: Any) -> bool:
    """Whether a user's hook reads or changes what the layer returns."""
    return any(getattr(hook, "__name__", "") != _CAPTURING_HOOK for hook in layer._forward_hooks.values())


def _is_watched_before(layer: Any) -> bool:
    return bool(layer._forward_pre_hooks)


_CLASSES: dict[type, type] = {}


def _remote_class(kind: type) -> type:
    if kind not in _CLASSES:
        made: Any = type(kind.__name__, (RemoteBlock, kind), {"__module__": kind.__module__})
        # Transformers wraps the `forward` of subclasses for gradient checkpointing (until 5.18 or so, `__call__`). A
        # remote block keeps nothing that checkpointing could save.
        made.forward = RemoteBlock.forward
        made.__call__ = nn.Module.__call__
        _CLASSES[kind] = made
    return _CLASSES[kind]


def make_remote(layers: nn.ModuleList, swarm: Runs) -> RemoteBlocks:
    """Turn a decoder's layers, built on the meta device, into remote blocks. Changes the layers."""
    for index, layer in enumerate(layers):
        replace_weights(layer)
        remote: Any = layer
        remote.__class__ = _remote_class(type(layer))
        remote.index, remote.swarm, remote.others = index, swarm, None
        remote._register_state_dict_hook(_leave_out)
    return RemoteBlocks(layers)


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """Remove the weights that only servers have from a state dict."""
    for name in [name for name, value in state.items() if name.startswith(prefix) and isinstance(value, RemoteWeight)]:
        del state[name]
