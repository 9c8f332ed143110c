"""How far two texts agree, as token ids: what was computed for one need not be computed for the other."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


def common_length(one: Sequence[int], other: Sequence[int], *, likely: int = 0) -> int:
    """How many tokens, from their beginning, two texts have in common.

    likely: they probably agree up to here. That is checked first, and costs little if it is wrong.
    """
    one, other = list(one), list(other)
    most = min(len(one), len(other))
    likely = min(likely, most)
    start = likely if one[:likely] == other[:likely] else 0
    # Whole slices are compared, since texts are long.
    return start + bisect_left(
        range(1, most - start + 1),
        True,
        key=lambda length: one[start : start + length] != other[start : start + length],
    )
