"""Rows are cut into micro-batches that fit, with little padding, and are put back in place."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from peerd.compute.training.micro_batches import cut_rows

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=20)


@given(LENGTHS, st.integers(40, 200))
def test_every_row_comes_back_and_no_micro_batch_is_too_large(lengths: list[int], most: int):
    micros = cut_rows(lengths, lambda rows, longest: rows * longest <= most)
    assert micros is not None
    packed = torch.randn(sum(lengths), 3)
    back = torch.zeros_like(packed)
    for micro in micros:
        assert micro.positions <= most
        assert 4 * sum(micro.lengths) >= 3 * micro.positions
        filled = micro.gather(packed)
        assert filled.shape == (len(micro.rows), micro.longest, 3)
        micro.scatter(filled, back)
    assert torch.equal(packed, back)
    assert sorted(row for micro in micros for row in micro.rows) == list(range(len(lengths)))


def test_equal_rows_are_not_copied():
    (micro,) = cut_rows([4, 4], lambda rows, longest: True) or []
    packed = torch.zeros(8, 3)
    assert micro.gather(packed).data_ptr() == packed.data_ptr()


def test_a_row_that_fits_nowhere_is_no_micro_batch():
    assert cut_rows([3, 9, 3], lambda rows, longest: longest < 9) is None
