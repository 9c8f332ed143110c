"""Messages against spec/vectors/connection/wire.json, however their bytes are split, and what a length may cost."""

import json
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerd.protocol.encoding.packing import pack
from peerd.protocol.encoding.wire import FIRST_ALLOCATION_BYTES, MAX_HEADER_BYTES, MessageReader, encode_message
from peerd.protocol.errors import LocalProtocolError, RemoteProtocolError

VECTORS = json.loads((Path(__file__).parents[3] / "spec/vectors/connection/wire.json").read_text())["messages"]
MAX_BODY = 100


def _value(value):
    if isinstance(value, dict):
        if set(value) == {"hex"}:
            return bytes.fromhex(value["hex"])
        return {key: _value(one) for key, one in value.items()}
    return [_value(one) for one in value] if isinstance(value, list) else value


def _read(data, cuts=(), max_body=MAX_BODY):
    """Messages in `data`, fed in pieces, and the bytes that were not consumed."""
    reader = MessageReader(max_body)
    found = []
    edges = [0, *sorted(cuts), len(data)]
    for start, end in pairwise(edges):
        piece = memoryview(data)[start:end]
        while piece:
            used = reader.feed(piece)
            assert 0 < used <= len(piece)
            piece = piece[used:]
            if (message := reader.take()) is not None:
                found.append((message.header, bytes(message.body)))
    return found, reader


@pytest.mark.parametrize("vector", [v for v in VECTORS if "header" in v], ids=lambda v: v["name"])
def test_valid_messages_decode_to_header_and_body_and_encode_back(vector):
    data = bytes.fromhex(vector["message"])
    expected = (_value(vector["header"]), bytes.fromhex(vector["body"]))
    found, reader = _read(data)
    assert found == [expected]
    assert not reader.in_message
    assert b"".join(encode_message(expected[0], [expected[1]])) == data


@pytest.mark.parametrize("vector", [v for v in VECTORS if "error" in v], ids=lambda v: v["name"])
def test_invalid_messages_are_refused_with_a_typed_error(vector):
    data = bytes.fromhex(vector["message"])
    with pytest.raises(RemoteProtocolError):
        _read(data)
    with pytest.raises(RemoteProtocolError):
        _read(data, range(1, len(data)))


headers = st.dictionaries(st.text(max_size=5), st.integers(-9, 9) | st.binary(max_size=9) | st.text(max_size=5))
messages = st.lists(st.tuples(headers, st.binary(max_size=MAX_BODY)), max_size=4)


@given(messages, st.data())
def test_decoding_does_not_depend_on_how_bytes_were_split(sent, data):
    stream = b"".join(part for header, body in sent for part in encode_message(header, [body]))
    cuts = data.draw(st.sets(st.integers(0, len(stream)), max_size=20))
    assert _read(stream, cuts)[0] == sent
    assert _read(stream, range(len(stream)))[0] == sent


@given(st.binary(max_size=60), st.sets(st.integers(0, 60)))
def test_any_bytes_give_messages_or_a_protocol_error(data, cuts):
    try:
        found, _ = _read(data, [cut for cut in cuts if cut <= len(data)])
    except RemoteProtocolError:
        return
    assert sum(len(body) for _, body in found) <= len(data)


@given(messages.filter(bool), st.data())
def test_a_changed_byte_gives_messages_or_a_protocol_error(sent, data):
    stream = bytearray(b"".join(part for header, body in sent for part in encode_message(header, [body])))
    at = data.draw(st.integers(0, len(stream) - 1))
    stream[at] ^= data.draw(st.integers(1, 255))
    try:
        _read(bytes(stream))
    except RemoteProtocolError:
        return


def test_the_body_is_sent_from_its_own_buffers():
    tensor = bytearray(b"0123456789")
    _, body = encode_message({"a": 1}, [tensor])
    tensor[0] = ord("X")
    assert bytes(body) == b"X123456789"


def test_a_body_that_lies_in_one_piece_is_not_copied():
    data = b"".join(encode_message({}, [b"abc"]))
    reader = MessageReader(MAX_BODY)
    reader.feed(data)
    assert reader.take().body.obj is data


def test_a_body_of_many_pieces_is_put_together():
    found, _ = _read(b"".join(encode_message({}, [b"abcdef"])), range(0, 20, 3))
    assert found == [({}, b"abcdef")]


def test_two_dimensional_buffers_count_their_bytes():
    grid: Any = memoryview(bytes(24)).cast("f", (2, 3))
    assert sum(len(piece) for piece in encode_message({}, [grid])) == 4 + 1 + 4 + 24


def test_a_body_that_is_only_announced_costs_one_allocation_step():
    claimed = 64 * 1024 * 1024
    data = b"".join(encode_message({}, []))[:-4] + claimed.to_bytes(4, "big") + b"x"
    tracemalloc.start()
    try:
        reader = MessageReader(claimed)
        reader.feed(data)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 2 * FIRST_ALLOCATION_BYTES
    assert reader.missing_body_bytes == claimed - 1


def test_a_body_beyond_the_limit_is_refused_before_any_of_it_is_kept():
    data = b"".join(encode_message({"a": 1}, [bytes(MAX_BODY + 1)]))
    with pytest.raises(RemoteProtocolError, match="a body of 101 bytes where at most 100 were expected"):
        _read(data)


def test_the_limit_may_change_between_messages():
    reader = MessageReader(0)
    data = b"".join([*encode_message({"n": 1}), *encode_message({"n": 2}, [b"abc"])])
    used = reader.feed(data)
    assert reader.take().header == {"n": 1}
    reader.max_body = 3
    reader.feed(data[used:])
    assert bytes(reader.take().body) == b"abc"


def test_our_own_headers_keep_the_limit():
    with pytest.raises(LocalProtocolError, match="at most 16384 bytes"):
        encode_message({"a": bytes(MAX_HEADER_BYTES)})
    with pytest.raises(LocalProtocolError, match="cannot be packed"):
        encode_message({"a": object()})


def test_a_header_of_16_kib_is_the_longest():
    filling = MAX_HEADER_BYTES - len(pack({"a": bytes(2**10)})) + 2**10
    data = b"".join(encode_message({"a": bytes(filling)}))
    assert len(data) == 4 + MAX_HEADER_BYTES + 4
    assert _read(data)[0] == [({"a": bytes(filling)}, b"")]


def test_repr_shows_how_far_it_is():
    reader = MessageReader(MAX_BODY)
    assert repr(reader) == "<MessageReader head 0/4>"
    reader.feed(b"".join(encode_message({}, [b"abc"]))[:-1])
    assert repr(reader) == "<MessageReader body 2/3>"
