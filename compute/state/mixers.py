"""Runs mixers (convolutions, linear attention, state spaces) on the rows of a batch, each from its own state.

A batch is one ragged sequence of the new positions of many rows, but a mixer of Transformers takes rows of one length.
So rows that add equally many positions run together: all decodes in one call. The rest of a block, and blocks with
attention, see the ragged batch as ever. Without a batch in view (forward and training) a mixer runs as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peerd.compute.adapters.span_adapters import SpanAdapters
from peerd.compute.families.layer_kinds import LayerKind
from peerd.compute.kv.layout import BATCH_TOKENS
from peerd.compute.state.mixer_cache import MixerCache
from peerd.compute.state.scans import ScanFrom, scan_from
from peerd.compute.state.store import RowStates, States, StateStore
from peerd.compute.steps import Piece, Segment, StateHome

#: How many logged inputs run through a mixer at once.
REPLAYED_AT_ONCE = BATCH_TOKENS
# The names by which blocks pass hidden states, masks and caches to their mixers.
_HIDDEN = ("hidden_states", "input_states", "x")
_CACHES = ("cache", "past_key_values", "cache_params")


class SpanMixers:
    """Connects a span's mixers with the running batch. One for each engine."""

    def __init__(
        self, layers: nn.ModuleList, kinds: Sequence[LayerKind], store: StateStore, adapters: SpanAdapters
    ) -> None:
        self.store = store
        self.adapters = adapters
        self._blocks = len(layers)
        self.segments: Sequence[Segment] | None = None
        #: By a row's home, how many logged inputs went through mixers again in this batch, in all blocks together.
        self.replayed: Counter[StateHome] = Counter()
        for layer, (block, kind) in enumerate(zip(layers, kinds, strict=True)):
            if kind.state is not None:
                mixer: Any = block.get_submodule(kind.state.mixer)
                scan = scan_from(mixer, kind.state.scan) if kind.state.scan else None
                mixer.forward = BlockMixer(self, layer, mixer.forward, scan)

    @contextmanager
    def running(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Inside this context, mixers get the new positions of these segments."""
        self.segments = segments
        self.replayed.clear()
        try:
            yield
        finally:
            self.segments = None

    def replayed_for(self, piece: Piece) -> int:
        """How many positions went through the mixers of the last batch again for a piece, as if every block had one."""
        again = sum(self.replayed[segment.state] for segment in piece.segments if segment.state is not None)
        return -(-again // max(self._blocks, 1))

    def has_run(self, layer: int, segments: Sequence[Segment]) -> bool:
        """Whether the block has kept the states at the ends of these segments."""
        return all(
            self.store.row(segment.state).trails[layer].kept[-1].position == segment.end
            for segment in segments
            if segment.state is not None
        )


class BlockMixer:
    """The forward of one block's mixer."""

    def __init__(
        self, owner: SpanMixers, layer: int, forward: Callable[..., torch.Tensor], scan: ScanFrom | None = None
    ) -> None:
        self._owner = owner
        self._layer = layer
        self._forward = forward
        self._scan = scan

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`hidden_states` `[1, positions, width]` of the batch in view; without one, of whole sequences."""
        segments = self._owner.segments
        if segments is None:
            return self._forward(*args, **kwargs)
        hidden, others = _arguments(args, kwargs)
        return self._run(hidden, segments, others)

    def _run(self, hidden: torch.Tensor, segments: Sequence[Segment], others: dict[str, Any]) -> torch.Tensor:
        inputs = torch.split(hidden[0], [segment.count for segment in segments])
        alike: dict[int, list[int]] = {}
        for index, segment in enumerate(segments):
            alike.setdefault(segment.count, []).append(index)
        outputs: list[torch.Tensor] = [hidden] * len(segments)
        for indexes in self._at_once(alike):
            rows = [self._begin(segments[index], others) for index in indexes]
            given = torch.stack([inputs[index] for index in indexes])
            states = tuple(torch.stack(tensors) for tensors in zip(*(states for _, states in rows), strict=True))
            together = [segments[index] for index in indexes]
            output, after = self._mix(given, states, together, others)
            for number, index in enumerate(indexes):
                row, own = rows[number][0], tuple(tensor[number] for tensor in after)
                self._end(row, segments[index], inputs[index], own)
                outputs[index] = output[number]
        return torch.cat(outputs)[None]

    def _at_once(self, alike: Mapping[int, list[int]]) -> Iterator[list[int]]:
        """Of rows that add equally many positions, as many as the memory for a batch allows at once."""
        for count, indexes in alike.items():
            most = self._owner.store.state(self._layer).rows_at_once(count, BATCH_TOKENS)
            yield from (indexes[first : first + most] for first in range(0, len(indexes), most))

    def _mix(
        self, hidden: torch.Tensor, states: States, segments: Sequence[Segment], others: dict[str, Any]
    ) -> tuple[torch.Tensor, States]:
        """Run rows of one length `[rows, positions, width]` from their states; the output, and the states after."""
        conv, recurrent = (*states, None)[:2]
        assert conv is not None
        cache = MixerCache(conv, recurrent)
        begin = recurrent if any(segment.start for segment in segments) else None
        with self._owner.adapters.applied(segments), self._beginning_with(begin):
            output = self._forward(hidden, **{self._cache_name(others): cache}, **_without_cache(others))
        return output, cache.states()

    @contextmanager
    def _beginning_with(self, recurrent: torch.Tensor | None) -> Iterator[None]:
        """Give the state to a scan that cannot take it from the cache; None if it is zeros."""
        if self._scan is None:
            yield
            return
        self._scan.initial = recurrent
        try:
            yield
        finally:
            self._scan.initial = None

    def _begin(self, segment: Segment, others: dict[str, Any]) -> tuple[RowStates, States]:
        """A row's state at the segment's start; computed again from an older one if need be."""
        assert segment.state is not None
        row = self._owner.store.row(segment.state)
        trail = row.trails[self._layer]
        trail.go_to(segment.start, segment.floor)
        if segment.count <= segment.state.room and segment.end - trail.oldest.position > row.log_size:
            position = trail.oldest.position
            states = row.load(self._layer, trail.oldest.place)
            states = self._replay(row, states, segment, position, segment.floor, others)
            place = trail.drop_oldest()
            row.save(self._layer, place, states)
            trail.put_oldest(segment.floor, place)
        newest = trail.kept[-1]
        states = row.load(self._layer, newest.place)
        return row, self._replay(row, states, segment, newest.position, segment.start, others)

    def _replay(
        self, row: RowStates, states: States, segment: Segment, start: int, end: int, others: dict[str, Any]
    ) -> States:
        """Bring a state from `start` to `end` by the inputs in the log."""
        # A client says how far its rows go back, but there is memory for the activations of one batch.
        assert segment.state is not None
        self._owner.replayed[segment.state] += end - start
        for first in range(start, end, REPLAYED_AT_ONCE):
            last = min(first + REPLAYED_AT_ONCE, end)
            logged = row.inputs(self._layer, first, last)
            again = Segment(first, last - first, (), segment.prompt_length, segment.adapter)
            _, after = self._mix(logged[None], tuple(tensor[None] for tensor in states), [again], others)
            states = tuple(tensor[0] for tensor in after)
        return states

    def _end(self, row: RowStates, segment: Segment, inputs: torch.Tensor, states: States) -> None:
        """Keep a row's state after the segment, and log the inputs unless there are too many."""
        assert segment.state is not None
        is_logged = segment.count <= segment.state.room
        if is_logged:
            row.log(self._layer, segment.start, inputs)
        trail = row.trails[self._layer]
        place = trail.place_for_next()
        row.save(self._layer, place, states)
        trail.add(segment.end, place, begins=not is_logged)

    @staticmethod
    def _cache_name(others: dict[str, Any]) -> str:
        return next(name for name in _CACHES if name in others)


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The hidden states, and the other arguments by name. Raises TypeError for what does not fit each row."""
    others = dict(kwargs)
    hidden = args[0] if args else next(others.pop(name) for name in _HIDDEN if name in others)
    if len(args) > 1 or not any(name in others for name in _CACHES):
        raise TypeError("a block gives its mixer arguments that peerd does not know")
    # Mamba's blocks hand on what their decoder was given; their mixers read no positions.
    others.pop("position_ids", None)
    if tensors := [name for name, value in others.items() if isinstance(value, torch.Tensor)]:
        raise TypeError(f"a block gives its mixer {', '.join(tensors)}, which peerd cannot cut by rows")
    return hidden, others


def _without_cache(others: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in others.items() if name not in _CACHES}
