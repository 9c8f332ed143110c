"""Computes how much memory a training pass takes before it starts.

The activations that autograd keeps of a block are measured once, on two short rows: one part grows with the
positions, another (the scores of attention that no fused kernel computes) with the square of a row's length. A
formula would have to know every family's blocks, also quantized and adapted ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from peerd.compute.errors import EngineError

# The lengths of the two measured rows, in positions: long enough that tiles of kernels and whole experts do not matter.
PROBE_POSITIONS = (32, 64)
# The kept activations differ a little with the routing of experts and the rounding of kernels.
_MARGIN = 1.15
# Beside the kept activations, a block's forward or backward has temporary values of about the same size at its peak.
_WORKING = 2.0
# A third of an engine's memory for training is for the pass that runs; the rest is for tapes that wait.
_WORKING_PART = 3
# One more tape may take this share of the memory that tapes have left: the first gets most, and none can take it all.
_TAPE_SHARE = 0.5


class PassTooLargeError(EngineError):
    """A row needs more memory than is set aside for training; the message has the numbers."""


@dataclass(frozen=True, slots=True)
class GraphBytes:
    """The bytes that autograd keeps of one block, for each position and for each pair of positions of one row."""

    a_position: float
    a_pair: float

    @classmethod
    def fitted(cls, short: tuple[int, int], long: tuple[int, int]) -> GraphBytes:
        """The cost from two measurements of (positions of one row, bytes)."""
        (one, one_bytes), (two, two_bytes) = short, long
        a_pair = max(0.0, (two_bytes / two - one_bytes / one) / (two - one))
        return cls(_MARGIN * max(one_bytes / one - a_pair * one, two_bytes / two - a_pair * two), _MARGIN * a_pair)

    def kept_bytes(self, rows: int, longest: int) -> int:
        """The bytes for `rows` rows of `longest` positions."""
        return int(rows * longest * (self.a_position + self.a_pair * longest))


@dataclass(frozen=True, slots=True)
class SpanCost:
    """The memory for passes over some blocks. `boundary`: bytes of one position between two blocks."""

    blocks: tuple[GraphBytes, ...]
    boundary: int
    largest_weight_bytes: int

    def inputs_bytes(self, positions: int) -> int:
        """The bytes of every block's input, which is the least that a backward needs."""
        return positions * self.boundary * len(self.blocks)

    def working_bytes(self, rows: int, longest: int) -> int:
        """The most bytes that a micro-batch needs at once: all blocks' inputs and one block's activations."""
        dearest = max(block.kept_bytes(rows, longest) for block in self.blocks)
        ends = 2 * rows * longest * self.boundary
        return int(self.inputs_bytes(rows * longest) + ends + _WORKING * dearest + self.largest_weight_bytes)


class PassMemory:
    """An engine's memory for training: the part for a running pass, and how much each owner holds in tapes."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._held: dict[Hashable, int] = {}

    def __repr__(self) -> str:
        return f"<PassMemory {sum(self._held.values())} of {self._tapes_bytes} bytes in tapes>"

    @property
    def working_bytes(self) -> int:
        """The bytes that the one running pass may take."""
        return self.total_bytes // _WORKING_PART

    @property
    def _tapes_bytes(self) -> int:
        return self.total_bytes - self.working_bytes

    @property
    def free_bytes(self) -> int:
        """The bytes that no tape holds."""
        return self._tapes_bytes - sum(self._held.values())

    @property
    def next_tape_bytes(self) -> int:
        """The most bytes that one more tape may take."""
        return max(0, int(self.free_bytes * _TAPE_SHARE))

    def take(self, owner: Hashable, size_bytes: int) -> None:
        """Note that `owner` holds `size_bytes` more; less if negative."""
        held = self._held.get(owner, 0) + size_bytes
        if held > 0:
            self._held[owner] = held
        else:
            self._held.pop(owner, None)


class KeptBytes:
    """Counts the bytes that autograd keeps inside `with`, each storage once, without the `known` tensors (weights)."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._found: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(self._found.values())

    def __enter__(self) -> KeptBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._found[storage.data_ptr()] = storage.nbytes()
        return tensor


def signature(layer: nn.Module) -> Hashable:
    """A key that is equal for blocks whose passes take equal memory: same module types and tensor shapes."""
    parts = [(name, type(module).__name__) for name, module in layer.named_modules()]
    tensors = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in layer.state_dict().items()]
    return tuple(parts), tuple(tensors)
