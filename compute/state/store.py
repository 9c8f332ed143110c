"""Reads and writes rows' running states and logs of inputs in the pages of the KV pool. Device thread only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

import torch
import torch.nn.functional as F

from peerd.compute.device.staging import upload
from peerd.compute.families.layer_kinds import LayerKind
from peerd.compute.families.running_state import RunningState, StateTensor
from peerd.compute.kv.pool import KVPool
from peerd.compute.kv.state_layout import BlockPlaces, Place, StateLayout, StatePlaces, log_positions
from peerd.compute.state.trails import Trail
from peerd.compute.steps import StateCopy, StateHome

#: A block's state of one row: the convolution's, and the recurrence's if there is one. Without a batch axis.
States = tuple[torch.Tensor, ...]


class RowStates:
    """One row's states in all blocks of the span: where they lie, and the trail of each block."""

    def __init__(self, store: StateStore, home: StateHome) -> None:
        self.home = home
        self.places = store.places(home.room)
        self.trails = [Trail() for _ in self.places.blocks]
        #: The positions that each log holds.
        self.log_size = log_positions(home.room)
        self._store = store
        self._pages = upload(home.pages, store.device)
        self._rows: dict[int, torch.Tensor] = {}

    def load(self, layer: int, place: int | None) -> States:
        """The state in one of a block's places; zeros for the empty row's."""
        state = self._store.state(layer)
        if place is None:
            return tuple(
                torch.zeros(tensor.shape, device=self._store.device, dtype=self._store.dtype_of(tensor))
                for tensor in state.tensors
            )
        places = self._block(layer).states[place]
        return tuple(self._read(where, tensor) for where, tensor in zip(places, state.tensors, strict=True))

    def save(self, layer: int, place: int, states: States) -> None:
        """Put a state into one of a block's places. Raises TypeError if it is not as the family's row says."""
        tensors = self._store.state(layer).tensors
        for where, tensor, state in zip(self._block(layer).states[place], tensors, states, strict=True):
            if tuple(state.shape) != tensor.shape or state.dtype != self._store.dtype_of(tensor):
                raise TypeError(f"a state of {state.dtype} {tuple(state.shape)}, not {tensor}")
            self._write(where, state.reshape(1, -1))

    def inputs(self, layer: int, start: int, end: int) -> torch.Tensor:
        """The logged inputs of the positions from `start` to `end - 1`: `[positions, width]`."""
        width = self._store.state(layer).width
        parts = [self._store.matrix(run.tensor)[self._index(run)] for run, _ in self._log_runs(layer, start, end)]
        counts = [count for _, count in self._log_runs(layer, start, end)]
        return torch.cat([part.reshape(count, -1)[:, :width] for part, count in zip(parts, counts, strict=True)])

    def log(self, layer: int, start: int, inputs: torch.Tensor) -> None:
        """Log the inputs `[positions, width]` of the positions from `start` on."""
        first = 0
        for run, count in self._log_runs(layer, start, start + len(inputs)):
            self._write(run, inputs[first : first + count])
            first += count

    def _block(self, layer: int) -> BlockPlaces:
        block = self.places.blocks[layer]
        assert block is not None
        return block

    def _log_runs(self, layer: int, start: int, end: int) -> Iterator[tuple[Place, int]]:
        """The places of these positions in the log, neighbours joined, and how many positions each run has."""
        log = self._block(layer).log
        places = [log[position % self.log_size] for position in range(start, end)]
        # Neighbours have the same tensor, and rows that follow each other.
        keys = [(place.tensor, place.first - index * place.rows) for index, place in enumerate(places)]
        for _, group in groupby(zip(keys, places, strict=True), itemgetter(0)):
            run = [place for _, place in group]
            yield Place(run[0].tensor, run[0].first, len(run) * run[0].rows), len(run)

    def _read(self, place: Place, tensor: StateTensor) -> torch.Tensor:
        flat = self._store.matrix(place.tensor)[self._index(place)].reshape(-1)
        dtype = self._store.dtype_of(tensor)
        return flat[: tensor.values(flat.itemsize)].view(dtype).view(tensor.shape)

    def _write(self, place: Place, values: torch.Tensor) -> None:
        """Write `[things, numbers]`, each thing into as many whole rows as it needs."""
        matrix = self._store.matrix(place.tensor)
        values = values.contiguous().view(matrix.dtype)
        padding = place.rows // len(values) * matrix.shape[1] - values.shape[1]
        if padding:
            values = F.pad(values, (0, padding))
        matrix.index_copy_(0, self._index(place), values.reshape(place.rows, -1))

    def _index(self, place: Place) -> torch.Tensor:
        return self._all_rows(place.tensor)[place.first : place.first + place.rows]

    def _all_rows(self, tensor: int) -> torch.Tensor:
        """The matrix rows of all of the row's pages in one tensor of the pool."""
        heads = self._store.heads(tensor)
        found = self._rows.get(heads)
        if found is None:
            found = self._rows[heads] = self._store.matrix_rows(self._pages, heads)
        return found


class StateStore:
    """The running states of a span's rows."""

    def __init__(self, pool: KVPool, layout: StateLayout, kinds: Sequence[LayerKind]) -> None:
        self.device = pool.device
        self._layout = layout
        self._pool = pool
        self._states = [kind.state for kind in kinds]
        # By a row's first page, which no other row has meanwhile.
        self._rows: dict[int, RowStates] = {}

    def row(self, home: StateHome) -> RowStates:
        """The states of the row that lives there. It has none if another row lived there before."""
        key = home.pages[0]
        row = self._rows.get(key)
        if row is None or row.home is not home:
            row = self._rows[key] = RowStates(self, home)
        return row

    def copy(self, copies: Sequence[StateCopy]) -> None:
        """Make rows copies of others, in order. A copy that was made is not made again, if a batch runs twice."""
        for copy in copies:
            if copy.done:
                continue
            source, target = self.row(copy.source), self.row(copy.target)
            # A copy that fails halfway leaves a row without a state, not one with parts of two.
            target.trails = [Trail() for _ in target.trails]
            for tensor, rows in self._whole(source, target):
                matrix = self.matrix(tensor)
                matrix.index_copy_(0, rows[1], matrix[rows[0]])
            target.trails = [trail.copy() for trail in source.trails]
            copy.done = True

    def places(self, room: int) -> StatePlaces:
        """Where a row that can be cut `room` positions behind its end keeps its states, in its own pages."""
        return self._layout.places(room, self._pool.page_tokens)

    def state(self, layer: int) -> RunningState:
        """What a row keeps in this block."""
        state = self._states[layer]
        assert state is not None
        return state

    def dtype_of(self, tensor: StateTensor) -> torch.dtype:
        return torch.float32 if tensor.in_fp32 else self._pool.dtype

    def matrix(self, tensor: int) -> torch.Tensor:
        """One tensor of the pool as a matrix `[heads * slots, width]`."""
        stored = self._pool.tensors[tensor]
        return stored.view(-1, stored.shape[-1])

    def heads(self, tensor: int) -> int:
        return int(self._pool.tensors[tensor].shape[0])

    def matrix_rows(self, pages: torch.Tensor, heads: int) -> torch.Tensor:
        """The rows of these pages in the matrix of a tensor with that many heads: page by page, then by head."""
        size, device = self._pool.page_tokens, self.device
        first = torch.arange(heads, device=device) * self._pool.slots_in_all
        slots = pages[:, None] * size + torch.arange(size, device=device)
        return (slots[:, None, :] + first[:, None]).flatten()

    def _whole(self, source: RowStates, target: RowStates) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
        for tensor, stored in enumerate(self._pool.tensors):
            if stored.shape[-1]:
                yield tensor, (source._all_rows(tensor), target._all_rows(tensor))
