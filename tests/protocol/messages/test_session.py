"""Session messages against spec/vectors/sessions/messages.json, and the rules that all messages share."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerd.protocol.encoding.packing import unpack
from peerd.protocol.encoding.schema import Message, parse
from peerd.protocol.errors import PeerdError, RemoteProtocolError
from peerd.protocol.messages import session as messages
from peerd.protocol.messages.session import Step
from peerd.protocol.rows import Fork

VECTORS = json.loads((Path(__file__).parents[3] / "spec/vectors/sessions/messages.json").read_text())["vectors"]
EVERYBODY: tuple[Any, ...] = (
    *messages.CONTROL_FROM_CLIENT,
    *messages.CONTROL_FROM_HOP,
    messages.Link,
    messages.Linked,
    messages.Ask,
    messages.Progress,
)


def _readable(value: object) -> object:
    """What the vectors hold: byte strings in hex, tuples as lists."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list | tuple):
        return [_readable(one) for one in value]
    if isinstance(value, dict):
        return {key: _readable(one) for key, one in value.items()}
    return value


def _header(vector: dict[str, str]) -> dict[str, object]:
    header = unpack(bytes.fromhex(vector["header"]), max_depth=8)
    assert isinstance(header, dict)
    return header


@pytest.mark.parametrize("vector", [v for v in VECTORS if "fields" in v], ids=lambda v: v["name"])
def test_valid_headers_decode_to_their_fields_and_encode_back(vector):
    message = parse(_header(vector), EVERYBODY)
    assert _readable(message.to_header()) == vector["fields"]
    assert parse(message.to_header(), EVERYBODY) == message


@pytest.mark.parametrize("vector", [v for v in VECTORS if "error" in v], ids=lambda v: v["name"])
def test_invalid_headers_are_refused_with_a_typed_error(vector):
    with pytest.raises(PeerdError) as caught:
        parse(_header(vector), EVERYBODY)
    assert caught.value.code == vector["error"]


def test_vectors_cover_every_message():
    assert {v["fields"]["type"] for v in VECTORS if "fields" in v} == {cls.TYPE for cls in EVERYBODY}


def test_a_message_that_this_direction_does_not_know_is_refused():
    route = messages.Route(epoch=1)
    with pytest.raises(RemoteProtocolError, match="expected output, opened, routed"):
        parse(route.to_header(), messages.CONTROL_FROM_HOP)


def test_the_refusal_names_the_field_and_what_it_should_be():
    header = Step(epoch=0, seq=1, rows=(), ops=(Fork(0, 1, 2),)).to_header() | {"epoch": "7"}
    with pytest.raises(RemoteProtocolError, match="step: epoch must be an integer from 0 to 4294967295"):
        parse(header, EVERYBODY)


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_fields = sorted({name for cls in EVERYBODY for name in cls.__dataclass_fields__})


@given(
    kind=st.sampled_from([cls.TYPE for cls in EVERYBODY]),
    fields=st.dictionaries(st.sampled_from(_fields), _values, max_size=12),
)
def test_any_values_give_a_message_or_a_protocol_error(kind, fields):
    try:
        message = parse({**fields, "type": kind}, EVERYBODY)
    except RemoteProtocolError:
        return
    assert isinstance(message, Message)
    assert kind == message.TYPE
