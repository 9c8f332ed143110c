"""What a hop has drawn, as bytes: the same numbers come back, and what no honest hop sends is refused."""

from __future__ import annotations

import math
import struct

import pytest

from peerd.protocol.errors import BadResult
from peerd.protocol.messages.drawing import pack_drawn, unpack_drawn

PAIRS = (((7, -0.5), (7, -0.5), (3, -1.25)), ((0, -20.0), (1, -0.125), (2, -3.0)))


def test_tokens_come_back_with_their_log_probabilities() -> None:
    assert unpack_drawn(memoryview(pack_drawn(PAIRS)), 2, 2, 8) == PAIRS


def test_tokens_alone_take_four_bytes_each() -> None:
    body = pack_drawn([((7, None),), ((300, None),)])
    assert len(body) == 8
    assert unpack_drawn(memoryview(body), 2, None, 301) == (((7, None),), ((300, None),))


def test_there_are_no_more_alternatives_than_tokens() -> None:
    body = pack_drawn([((0, -0.5), (0, -0.5), (1, -1.0))])
    assert len(unpack_drawn(memoryview(body), 1, 20, 2)[0]) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_log_probability_that_is_not_finite_is_not_sent(value: float) -> None:
    with pytest.raises(BadResult, match="not finite"):
        pack_drawn([((7, value),)])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.1])
def test_a_log_probability_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(BadResult, match="log-probability"):
        unpack_drawn(memoryview(struct.pack("<If", 1, value)), 1, 0, 8)


@pytest.mark.parametrize("token", [8, 2**32 - 1])
def test_a_token_that_the_vocabulary_lacks_is_refused(token: int) -> None:
    with pytest.raises(BadResult, match="vocabulary of 8"):
        unpack_drawn(memoryview(struct.pack("<I", token)), 1, None, 8)


@pytest.mark.parametrize("size", [0, 4, 7, 12])
def test_more_or_fewer_bytes_are_refused(size: int) -> None:
    with pytest.raises(BadResult, match=f"{size} bytes of drawn tokens instead of 8"):
        unpack_drawn(memoryview(bytes(size)), 2, None, 8)
