from __future__ import annotations

from math import inf

import pytest
import torch

from peerd.compute.audits.distance import distance

X = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)) * 100
ADDED = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
Y = X + ADDED


def test_equal_results_are_not_apart() -> None:
    assert distance(X, Y, Y) == 0
    assert distance(X, X, X) == 0


def test_a_server_that_returns_its_input_is_1_away_however_large_the_input_is() -> None:
    assert distance(X, Y, X) == distance(X, X, Y) == pytest.approx(1, abs=1e-4)


def test_it_is_relative_to_what_the_blocks_added() -> None:
    assert distance(X, Y, X + 1.1 * ADDED) == pytest.approx(0.1 / 1.1, abs=1e-3)


def test_a_few_positions_may_be_far_apart_and_a_third_may_not() -> None:
    few, many = Y.clone(), Y.clone()
    few[:6], many[:11] = 0, 0
    assert distance(X, Y, few) == 0
    assert distance(X, Y, many) > 0.5


def test_what_is_not_finite_is_infinitely_far() -> None:
    broken = Y.clone()
    broken[:, 0] = torch.nan
    assert distance(X, Y, broken) == inf


def test_narrow_dtypes_are_compared_in_float32() -> None:
    narrow = Y.to(torch.bfloat16)
    assert 0 < distance(X.to(torch.bfloat16), narrow, narrow + 1) < 1
