"""Reordering, selecting, repeating and cropping a cache have the same effect on its sessions as on lists of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from peerd.facade.cache import RemoteCache, Run, settle
from peerd.protocol.rows import Fork
from peerd.protocol.span import Span

MAX_ROWS = 4
SPAN = Span(0, 8)


class World:
    """A cache beside what it stands for: `batch` is Transformers' rows, `session` those of a server.

    A step here does what `_Step` does, with lists instead of tensors.
    """

    def __init__(self, rows: int) -> None:
        self.cache = RemoteCache(8)
        nothing: Any = None
        self.run = Run(SPAN, nothing, 100, MAX_ROWS, 100, 0, {}, [], lambda: None, sources=list(range(rows)))
        self.cache.runs[0, SPAN] = self.run
        self.batch: list[list[int]] = [[] for _ in range(rows)]
        self.session: dict[int, list[int]] = {}
        self._next = 0

    def step(self, counts: list[int]) -> None:
        """Row i gets `counts[i]` new tokens, on the right of as many columns as the longest has."""
        columns = max(counts)
        past = self.cache.lengths() if self.cache.columns else [0] * len(counts)
        assert past == [len(row) for row in self.batch]
        rows, ops = settle(self.run.sources, past, list(self.session), MAX_ROWS)
        assert len(set(rows)) == len(rows)
        assert all(0 <= row < MAX_ROWS for row in rows)
        for op in ops:
            if isinstance(op, Fork):
                assert len(self.session.get(op.source, [])) >= op.length
                assert op.target not in self.run.sources
                self.session[op.target] = self.session[op.source][: op.length]
            else:
                del self.session[op.row]
        for index, (row, count, start) in enumerate(zip(rows, counts, past, strict=True)):
            new = list(range(self._next, self._next + count))
            self._next += count
            self.batch[index] = self.batch[index] + new
            if count:
                self.session[row] = self.session.get(row, [])[:start] + new
        self.run.sources = rows
        mask = torch.tensor([[column >= columns - count for column in range(columns)] for count in counts])
        self.cache.note(None if bool(mask.all()) else mask, len(counts), columns)

    def check(self) -> None:
        """Each row of the batch has its past in the session row that the table names."""
        for row, source in zip(self.batch, self.run.sources, strict=True):
            assert self.session.get(source, [])[: len(row)] == row


@settings(deadline=None)
@given(st.data())
def test_any_sequence_of_operations_leaves_each_row_with_its_own_past(data: st.DataObject) -> None:
    world = World(data.draw(st.integers(1, MAX_ROWS)))
    for _ in range(data.draw(st.integers(1, 10))):
        count = len(world.batch)
        kind = data.draw(st.sampled_from(["step", "reorder", "select", "repeat", "crop"]))
        if kind == "step" or not world.cache.columns:
            counts = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count).filter(any))
            world.step(counts)
        elif kind == "reorder":
            order = data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
            world.cache.reorder_cache(torch.tensor(order))
            world.batch = [world.batch[index] for index in order]
        elif kind == "select":
            chosen = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=MAX_ROWS))
            world.cache.batch_select_indices(torch.tensor(chosen))
            world.batch = [world.batch[index] for index in chosen]
        elif kind == "repeat":
            times = data.draw(st.integers(1, MAX_ROWS // count))
            world.cache.batch_repeat_interleave(times)
            world.batch = [row for row in world.batch for _ in range(times)]
        else:
            crop(world, data.draw(st.integers(1, world.cache.columns)))
        world.check()


def crop(world: World, columns: int) -> None:
    """Take columns away; a row loses those of them that were real."""
    mask = world.cache.mask
    for index, row in enumerate(world.batch):
        real = columns if mask is None else int(mask[index, -columns:].sum())
        world.batch[index] = row[: len(row) - real]
    world.cache.crop(-columns)


def test_beams_of_one_prompt_share_its_row_until_they_differ() -> None:
    rows, ops = settle([0, 0, 0], [7, 7, 7], [0], 3)
    assert rows == [0, 1, 2]
    assert ops == [Fork(0, 1, 7), Fork(0, 2, 7)]


@pytest.mark.parametrize(("given_count", "stays"), [(-2, 3), (2, 2), (-9, 0), (9, 5)])
def test_crop_takes_what_to_remove_or_what_to_keep_as_releases_of_transformers_mean_it(
    given_count: int, stays: int
) -> None:
    cache = RemoteCache(8)
    cache.note(None, 1, 5)
    cache.crop(given_count)
    assert cache.columns == stays
    assert cache.get_seq_length() == stays


def test_only_an_empty_dynamic_cache_becomes_a_remote_one(local: Any) -> None:
    empty = DynamicCache(config=local.config)
    same = empty
    assert RemoteCache.adopt(empty, 8) is same
    assert isinstance(same, RemoteCache)
    assert len(same.layers) == 8
    with pytest.raises(TypeError, match="StaticCache cannot hold"):
        RemoteCache.adopt(StaticCache(config=local.config, max_cache_len=8), 8)


def test_keys_and_values_are_not_to_be_had() -> None:
    cache = RemoteCache(8)
    with pytest.raises(RuntimeError, match="on their servers"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(TypeError, match="on their servers"):
        iter(cache)
