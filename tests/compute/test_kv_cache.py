from __future__ import annotations

import pytest
import torch

from peerd.compute.kv_cache import KVPool, KVWriter
from peerd.compute.layer_kinds import LayerKind
from peerd.compute.steps import PageCopy, Segment

SIZE = 4
# Keys and values of different widths, as in multi-head latent attention.
KINDS = (LayerKind(None, None, kv_heads=2, key_dim=6, value_dim=3), LayerKind(8, None, 1, 2, 2))


@pytest.fixture
def pool() -> KVPool:
    return KVPool(KINDS, 40, SIZE, device=torch.device("cpu"), dtype=torch.float32)


def write(pool: KVPool, segments: list[Segment], block: int = 0) -> torch.Tensor:
    rows = [pool.slots(segment) for segment in segments]
    new = torch.randn(KINDS[block].kv_heads, sum(segment.count for segment in segments), KINDS[block].key_dim)
    KVWriter(rows, segments, pool.device).write(pool.keys[block], new)
    return new


def read(pool: KVPool, segment: Segment, start: int = 0, block: int = 0) -> torch.Tensor:
    return pool.slots(segment).read(pool.keys[block], start)


@pytest.mark.parametrize("pages", [range(3, 6), (7, 1, 4)])
def test_what_was_written_in_parts_reads_back_as_one_row(pool: KVPool, pages):
    first = write(pool, [Segment(0, 5, pages[:2], 12)])
    second = write(pool, [Segment(5, 7, pages, 12)])
    last = Segment(11, 1, pages, 12)
    assert torch.equal(read(pool, last), torch.cat([first, second], 1))
    assert torch.equal(read(pool, last, start=6), second[:, 1:])


def test_a_row_whose_pages_lie_side_by_side_reads_without_a_copy(pool: KVPool):
    segment = Segment(0, 9, range(2, 5), 9)
    assert read(pool, segment).data_ptr() == pool.keys[0][:, 2 * SIZE].data_ptr()


def test_rows_of_a_batch_are_written_each_to_its_own_pages(pool: KVPool):
    segments = [Segment(0, 3, (9,), 8), Segment(0, 6, range(0, 2), 8), Segment(0, 1, (5,), 8)]
    new = write(pool, segments)
    for segment, expected in zip(segments, new.split([3, 6, 1], dim=1), strict=True):
        assert torch.equal(read(pool, segment), expected)


def test_copied_pages_hold_the_same_in_every_block(pool: KVPool):
    for block in range(2):
        written = write(pool, [Segment(0, 6, (0, 1), 8)], block)
        pool.copy_pages([PageCopy(0, 6), PageCopy(1, 3)])
        assert torch.equal(read(pool, Segment(5, 1, (6, 3), 8), block=block), written)
