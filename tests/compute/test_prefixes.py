"""How far two texts agree, however the hint is."""

from __future__ import annotations

import pytest

from peerd.compute.prefixes import common_length


@pytest.mark.parametrize("likely", [0, 1, 2, 3, 100])
@pytest.mark.parametrize(
    ("one", "other", "length"),
    [
        ([], [], 0),
        ([1], [], 0),
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2, 3], [1, 9, 3], 1),
        ([7, 2, 3], [1, 2, 3], 0),
        ([1, 2, 3, 4, 5, 6], (1, 2, 3, 4, 8, 6, 7), 4),
    ],
)
def test_the_first_tokens_that_two_texts_share_are_counted(
    one: list[int], other: list[int], length: int, likely: int
) -> None:
    assert common_length(one, other, likely=likely) == length
    assert common_length(other, one, likely=likely) == length
