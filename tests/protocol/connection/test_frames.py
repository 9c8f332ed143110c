"""Frames against spec/vectors/connection/frames.json, and strictness against anything else."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerd.protocol.connection.frames import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_REASON_BYTES,
    DataFrame,
    GoAwayFrame,
    Priority,
    ResetFrame,
    decode_frame,
    encode_data,
    encode_frame,
)
from peerd.protocol.errors import RemoteProtocolError

VECTORS = json.loads((Path(__file__).parents[3] / "spec/vectors/connection/frames.json").read_text())["frames"]


def _bytes(vector):
    byte, count = vector.get("then", ("", 0))
    return bytes.fromhex(vector["frame"] + byte * count)


def _fields(frame):
    found = {"kind": type(frame).__name__.removesuffix("Frame").upper()}
    for name in type(frame).__slots__:
        value = getattr(frame, name)
        found[name] = bytes(value).hex() if isinstance(value, bytes | memoryview) else value
    return found


@pytest.mark.parametrize("vector", [v for v in VECTORS if "fields" in v], ids=lambda v: v["name"])
def test_valid_frames_decode_to_their_fields_and_encode_back(vector):
    frame = decode_frame(_bytes(vector))
    assert _fields(frame) == vector["fields"]
    assert encode_frame(frame) == _bytes(vector)


@pytest.mark.parametrize("vector", [v for v in VECTORS if "error" in v], ids=lambda v: v["name"])
def test_invalid_frames_are_refused_with_a_typed_error(vector):
    with pytest.raises(RemoteProtocolError):
        decode_frame(_bytes(vector))


def test_vectors_cover_every_kind():
    assert {v["fields"]["kind"] for v in VECTORS if "fields" in v} == set(
        ["OPEN", "DATA", "CREDIT", "RESET", "PING", "PONG", "GOAWAY"]
    )


def test_a_payload_of_32_kib_is_the_longest():
    longest = encode_data(1, [bytes(MAX_PAYLOAD_BYTES)], fin=False)
    assert len(longest) == MAX_FRAME_BYTES
    assert len(decode_frame(longest).payload) == MAX_PAYLOAD_BYTES
    with pytest.raises(RemoteProtocolError, match="a frame of 32775 bytes"):
        decode_frame(longest + b"x")


def test_data_is_a_view_of_what_was_received():
    received = encode_data(1, [b"abc", memoryview(b"def")], fin=True)
    frame = decode_frame(received)
    assert frame == DataFrame(1, memoryview(b"abcdef"), True)
    assert frame.payload.obj is received


def test_a_long_reason_is_cut_between_characters():
    said = decode_frame(encode_frame(GoAwayFrame("closed", "é" * MAX_REASON_BYTES)))
    assert said == GoAwayFrame("closed", "é" * (MAX_REASON_BYTES // 2))


def test_our_own_codes_keep_to_the_alphabet():
    with pytest.raises(ValueError, match="no code"):
        encode_frame(ResetFrame(1, "Not a code"))


def test_the_more_urgent_priority_is_the_smaller():
    assert sorted([Priority.BULK, Priority.DECODE, Priority.CONTROL, Priority.PREFILL]) == list(Priority)


@given(st.binary(max_size=64) | st.builds(lambda kind, rest: bytes([kind]) + rest, st.integers(0, 9), st.binary()))
def test_any_bytes_give_a_frame_that_encodes_back_or_a_protocol_error(data):
    try:
        frame = decode_frame(data)
    except RemoteProtocolError:
        return
    assert len(data) >= HEADER_BYTES
    assert encode_frame(frame) == data
