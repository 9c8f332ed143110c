"""Bodies whose JSON Python reads, and cannot write or encode again, are refused before anything else sees them."""

from __future__ import annotations

import json

import pytest
import trio

from peerd.api.errors import ApiError
from peerd.api.fields import parse_json
from peerd.api.strict_json import MAX_DEPTH, BadJson, decode_first, decode_json


def nested(depth):
    return b'{"x": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_a_body_may_nest_as_deeply_as_the_limit_says():
    assert json.dumps(parse_json(nested(MAX_DEPTH)).take("x")).count("[") == MAX_DEPTH - 1


async def test_a_body_that_nests_more_deeply_is_refused_with_the_limit_on_every_thread():
    for depth in (MAX_DEPTH + 1, 980, 100_000):
        with pytest.raises(ApiError, match="nested too deeply, in more than 128 levels") as caught:
            parse_json(nested(depth))
        assert caught.value.status == 400
        with pytest.raises(ApiError, match="nested too deeply, in more than 128 levels"):
            await trio.to_thread.run_sync(parse_json, nested(depth))


def test_brackets_side_by_side_or_in_strings_are_no_depth():
    value = {"x": [[], {}] * 500, "y": "[{" * 500}
    assert decode_json(json.dumps(value)) == value


def test_numbers_that_become_infinite_are_refused():
    with pytest.raises(ApiError, match=r"the body is not JSON that can be read: -1e999 is too large a number"):
        parse_json(b'{"x": -1e999}')


def test_the_first_value_is_checked_and_what_follows_is_not():
    assert decode_first('{"a": 1}; {"b": "\\ud800"}') == ({"a": 1}, 8)
    with pytest.raises(BadJson, match="half a character"):
        decode_first('{"b": "\\ud800"}; {"a": 1}')
