"""A relay's messages against spec/vectors/discovery/relay.json, and what a circuit carries."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerd.protocol.connection.frames import MAX_PAYLOAD_BYTES
from peerd.protocol.connection.noise import TAG_BYTES
from peerd.protocol.encoding.packing import unpack
from peerd.protocol.encoding.schema import parse
from peerd.protocol.encoding.wire import RawMessage, encode_message
from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.messages import relay as relay_messages
from peerd.protocol.messages.relay import (
    INNER_PAYLOAD_BYTES,
    MAX_INNER_BYTES,
    Accepted,
    Connect,
    Connected,
    IncomingCall,
    Reserve,
    Reserved,
    inner_message,
)

VECTORS = json.loads((Path(__file__).parents[3] / "spec/vectors/discovery/relay.json").read_text())["vectors"]
EVERYBODY = (Reserve, Reserved, Connect, Connected, IncomingCall, Accepted)
HEADER_BYTES = 6


def _header(vector):
    return unpack(bytes.fromhex(vector["header"]), max_depth=8)


@pytest.mark.parametrize("vector", [v for v in VECTORS if "fields" in v], ids=lambda v: v["name"])
def test_valid_headers_decode_to_their_fields_and_encode_back(vector):
    message = parse(_header(vector), EVERYBODY)
    assert message.to_header() == vector["fields"]


@pytest.mark.parametrize("vector", [v for v in VECTORS if "error" in v], ids=lambda v: v["name"])
def test_invalid_headers_are_refused(vector):
    with pytest.raises(RemoteProtocolError):
        parse(_header(vector), EVERYBODY)


def test_vectors_cover_every_message():
    assert {v["fields"]["type"] for v in VECTORS if "fields" in v} == {cls.TYPE for cls in EVERYBODY}


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=60) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_fields = sorted({name for cls in EVERYBODY for name in cls.__dataclass_fields__})


@given(
    kind=st.sampled_from([cls.TYPE for cls in EVERYBODY]) | _values,
    fields=st.dictionaries(st.sampled_from(_fields), _values, max_size=5),
)
def test_any_values_give_a_message_or_a_protocol_error(kind, fields):
    try:
        message = parse({**fields, "type": kind}, EVERYBODY)
    except RemoteProtocolError:
        return
    assert kind == message.TYPE


@given(
    header=st.dictionaries(st.text(max_size=4), st.none(), max_size=1),
    size=st.integers(0, 3) | st.integers(MAX_INNER_BYTES - 2, MAX_INNER_BYTES + 2),
)
def test_a_circuit_carries_whole_messages_and_nothing_beside_them(header, size):
    message = RawMessage(header, memoryview(bytes(size)))
    if not header and 0 < size <= MAX_INNER_BYTES:
        assert inner_message(message) is message.body
    else:
        with pytest.raises(RemoteProtocolError):
            inner_message(message)


@pytest.mark.parametrize(
    ("inner_payload", "outer_payload"), [(INNER_PAYLOAD_BYTES, 16 * 1024), (31 * 1024, MAX_PAYLOAD_BYTES)]
)
def test_one_inner_frame_fits_into_one_outer_frame(inner_payload, outer_payload):
    inner = bytes(inner_payload + HEADER_BYTES + TAG_BYTES)
    assert sum(map(len, encode_message({}, [inner]))) <= outer_payload
    assert len(inner) <= relay_messages.MAX_INNER_BYTES
