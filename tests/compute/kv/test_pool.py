from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from peerd.compute.families.layer_kinds import LayerKind
from peerd.compute.kv.layout import lay_out
from peerd.compute.kv.pool import KVPool, KVWriter
from peerd.compute.steps import PageCopy, RowPages, Segment

SIZE = 4
# Keys and values of different widths, as in multi-head latent attention.
KINDS = (LayerKind(None, None, kv_heads=2, key_dim=6, value_dim=3), LayerKind(8, None, 1, 2, 2))
LAYOUT = lay_out(KINDS)


@pytest.fixture
def pool() -> KVPool:
    return KVPool(KINDS, LAYOUT, 10, SIZE, device=torch.device("cpu"), dtype=torch.float32)


def at(start: int, count: int, pages: Sequence[int], first: int = 0) -> Segment:
    return Segment(start, count, [RowPages(first, pages)], 12)


def write(pool: KVPool, segments: list[Segment], block: int = 0) -> torch.Tensor:
    rows = [pool.slots(segment, 0) for segment in segments]
    new = torch.randn(KINDS[block].kv_heads, sum(segment.count for segment in segments), KINDS[block].key_dim)
    KVWriter(rows, segments, pool.device).write(pool.keys[block], new)
    return new


def read(pool: KVPool, segment: Segment, start: int = 0, block: int = 0) -> torch.Tensor:
    return pool.slots(segment, 0).read(pool.keys[block], start)


@pytest.mark.parametrize("pages", [range(3, 6), (7, 1, 4)])
def test_what_was_written_in_parts_reads_back_as_one_row(pool: KVPool, pages):
    first = write(pool, [at(0, 5, pages[:2])])
    second = write(pool, [at(5, 7, pages)])
    last = at(11, 1, pages)
    assert torch.equal(read(pool, last), torch.cat([first, second], 1))
    assert torch.equal(read(pool, last, start=6), second[:, 1:])


def test_a_row_whose_pages_lie_side_by_side_reads_without_a_copy(pool: KVPool):
    segment = at(0, 9, range(2, 5))
    assert read(pool, segment).data_ptr() == pool.keys[0][:, 2 * SIZE].data_ptr()


def test_rows_of_a_batch_are_written_each_to_its_own_pages(pool: KVPool):
    segments = [at(0, 3, (9,)), at(0, 6, range(0, 2)), at(0, 1, (5,))]
    new = write(pool, segments)
    for segment, expected in zip(segments, new.split([3, 6, 1], dim=1), strict=True):
        assert torch.equal(read(pool, segment), expected)


def test_copied_pages_hold_the_same_in_every_block(pool: KVPool):
    for block in range(2):
        written = write(pool, [at(0, 6, (0, 1))], block)
        pool.copy_pages([PageCopy(0, 6), PageCopy(1, 3)])
        assert torch.equal(read(pool, at(5, 1, (6, 3)), block=block), written)


def test_a_row_that_forgot_its_beginning_reads_from_where_it_begins(pool: KVPool):
    for pages in (range(3, 6), (7, 1, 4)):
        write(pool, [at(0, 8, pages[:2])])
        second = write(pool, [at(8, 3, pages[1:], first=SIZE)])
        assert torch.equal(read(pool, at(10, 1, pages[1:], first=SIZE), start=8), second)


def test_blocks_of_different_groups_share_memory_and_not_pages():
    kinds = [LayerKind(None, None, 1, 2, 2), LayerKind(8, None, 1, 2, 2)]
    pool = KVPool(kinds, lay_out(kinds), 10, SIZE, device=torch.device("cpu"), dtype=torch.float32)
    assert pool.keys[0] is pool.keys[1]
    segment = Segment(0, 3, [RowPages(0, range(4, 5)), RowPages(0, range(2, 3))], 12)
    assert [pool.slots(segment, group).tail(2) for group in range(2)] == [range(18, 19), range(10, 11)]
