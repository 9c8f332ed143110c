"""Places what a row keeps in blocks with a running state into pages of the KV pool. Arithmetic only, no tensors.

A row's state has a fixed size, so a session takes whole pages for it when it opens, and gives them back when it
closes: KV and states share one memory, and both are counted in KV tokens. In each block a row keeps three states, of
different positions, and a log of the mixer's last inputs (`state.trails` says why). A page has slots in each tensor of
the pool. Seen as a matrix, one head of one slot is a row of the tensor; every state and every input of the log takes
whole rows of one tensor, so that it can be read with one index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from peerd.compute.families.layer_kinds import LayerKind
from peerd.compute.families.running_state import RunningState
from peerd.protocol.rows import DECODE_POSITIONS

#: The states that a row keeps in each block: one from which it can go back, the last one, and one between them.
STATES = 3
# Clients choose how far back their rows can be cut, so not all layouts that were ever asked for are kept.
_KEPT_LAYOUTS = 32


@dataclass(frozen=True, slots=True)
class Place:
    """Neighbouring matrix rows of one tensor, counted from the beginning of the row's own pages."""

    tensor: int
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class Run:
    """Inputs of a log that lie side by side: `inputs` of them, of which each takes `rows` matrix rows of one tensor."""

    tensor: int
    first: int
    rows: int
    inputs: int


@dataclass(frozen=True, slots=True)
class LogPlaces:
    """Where a block's log of inputs lies. A client says how long it is, so it is not a list of all places."""

    runs: tuple[Run, ...]

    def __len__(self) -> int:
        return sum(run.inputs for run in self.runs)

    def __getitem__(self, number: int) -> Place:
        left = number
        for run in self.runs:
            if left < run.inputs:
                return Place(run.tensor, run.first + left * run.rows, run.rows)
            left -= run.inputs
        raise IndexError(f"input {number} of a log of {len(self)}")


@dataclass(frozen=True, slots=True)
class BlockPlaces:
    """Where one block's states (each a place for every tensor of the state) and its log of inputs lie."""

    states: tuple[tuple[Place, ...], ...]
    log: LogPlaces


@dataclass(frozen=True, slots=True)
class StatePlaces:
    """The pages that a row takes for its states, and the places of each block in them; None for a block without."""

    pages: int
    blocks: tuple[BlockPlaces | None, ...]


def log_positions(room: int) -> int:
    """How many inputs a log holds, for rows that can be cut `room` positions behind their end.

    Between the state from which a row can go back and the end lie at most `room` positions until a newer state takes
    over, and that one is itself at most `room` behind the end; the rest is for the batch that is added.
    """
    return 2 * room + DECODE_POSITIONS


class StateLayout:
    """The states of a span's blocks in the pages of its pool.

    tensors: the heads and the width of each tensor of the pool. itemsize: the bytes of its numbers.
    """

    def __init__(self, kinds: Sequence[LayerKind], tensors: Sequence[tuple[int, int]], itemsize: int) -> None:
        self._states = [kind.state for kind in kinds]
        self._tensors = tuple(tensors)
        self._itemsize = itemsize
        # Both the main thread and the device thread ask.
        self._found = lru_cache(_KEPT_LAYOUTS)(self._places)

    def places(self, room: int, page_tokens: int) -> StatePlaces:
        """The places for a row that can be cut `room` positions behind its end, in pages of `page_tokens` slots."""
        return self._found(room, page_tokens)

    def _places(self, room: int, page_tokens: int) -> StatePlaces:
        matrices = [(heads * page_tokens, width) for heads, width in self._tensors]
        return self._place(log_positions(room), matrices)

    def _place(self, inputs: int, matrices: list[tuple[int, int]]) -> StatePlaces:
        values = sum(
            STATES * sum(tensor.values(self._itemsize) for tensor in state.tensors) + inputs * state.width
            for state in self._states
            if state is not None
        )
        pages = -(-values // sum(rows * width for rows, width in matrices))
        while (blocks := self._fill(pages, inputs, matrices)) is None:
            # Nothing is split between two tensors, so some rows of them stay unused.
            pages += max(pages // 64, 1)
        return StatePlaces(pages, blocks)

    def _fill(self, pages: int, inputs: int, matrices: list[tuple[int, int]]) -> tuple[BlockPlaces | None, ...] | None:
        """The places in this many pages; None if they are too few. Large things first: small ones fill the gaps."""
        free = _Free([(pages * rows, width) for rows, width in matrices])
        try:
            states = [None if state is None else self._take_states(free, state) for state in self._states]
            return tuple(
                None if state is None or kept is None else BlockPlaces(kept, free.take_log(state.width, inputs))
                for state, kept in zip(self._states, states, strict=True)
            )
        except _Full:
            return None

    def _take_states(self, free: _Free, state: RunningState) -> tuple[tuple[Place, ...], ...]:
        return tuple(tuple(free.take(tensor.values(self._itemsize)) for tensor in state.tensors) for _ in range(STATES))


class _Full(Exception):
    """No tensor has enough rows left."""


class _Free:
    """The rows of each matrix that are not taken yet."""

    def __init__(self, matrices: Sequence[tuple[int, int]]) -> None:
        self._matrices = matrices
        self._taken = [0] * len(matrices)

    def take(self, values: int) -> Place:
        for tensor, (rows, width) in enumerate(self._matrices):
            wanted, first = -(-values // width) if width else rows + 1, self._taken[tensor]
            if first + wanted <= rows:
                self._taken[tensor] += wanted
                return Place(tensor, first, wanted)
        raise _Full

    def take_log(self, values: int, inputs: int) -> LogPlaces:
        """Places for a log of so many inputs of `values` numbers."""
        runs = []
        for tensor, (rows, width) in enumerate(self._matrices):
            each, first = -(-values // width) if width else rows + 1, self._taken[tensor]
            if count := min((rows - first) // each, inputs):
                self._taken[tensor] += count * each
                runs.append(Run(tensor, first, each, count))
                inputs -= count
        if inputs:
            raise _Full
        return LogPlaces(tuple(runs))
