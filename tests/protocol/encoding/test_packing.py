import tracemalloc

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.protocol.encoding.packing import MAX_DEPTH, pack, unpack
from peerd.protocol.errors import RemoteProtocolError


@pytest.mark.parametrize(
    ("packed", "says"),
    [
        (b"", "incomplete"),
        (b"\x01\x01", "extra data"),
        (b"\xc1", "malformed"),
        (b"\xdf\xff\xff\xff\xff", "incomplete"),
        (b"\xa1\xff", "utf-8"),
        (b"\x82\xa1a\x01\xa1a\x02", "same key twice"),
        (b"\x81\xc4\x01a\x01", "keys must be text"),
        (b"\x81\x01\x01", "map key"),
        (b"\x81\x90\x01", "map key"),
        (b"\xd4\x05\x00", "extension type 5"),
        (b"\xd6\xff\x00\x00\x00\x01", "extension type -1"),
        (b"\x81\xa1a\xd6\xff\x00\x00\x00\x01", "extension type -1"),
        (b"\x91" * (MAX_DEPTH + 1) + b"\xc0", "too deep"),
        (b"\x81\xa1a" * (MAX_DEPTH + 1) + b"\xc0", "too deep"),
        (b"\x91" * 5000 + b"\xc0", "malformed"),
    ],
)
def test_what_two_implementations_might_read_differently_is_refused(packed, says):
    with pytest.raises(RemoteProtocolError, match=says):
        unpack(packed)


def test_depth_is_counted_in_containers():
    assert unpack(b"\x91" * MAX_DEPTH + b"\x01")
    assert unpack(b"\x01", max_depth=0) == 1
    with pytest.raises(RemoteProtocolError, match="too deep"):
        unpack(b"\x90", max_depth=0)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(derandomize=True)
@given(VALUES)
def test_what_is_packed_comes_back(value):
    assert unpack(pack(value), max_depth=20) == value


@settings(derandomize=True, max_examples=400)
@given(st.binary(max_size=60))
def test_random_bytes_are_a_value_or_a_typed_error(data):
    try:
        value = unpack(data)
    except RemoteProtocolError:
        return
    assert pack(value) == pack(msgpack.unpackb(data))


def test_a_list_that_claims_more_than_there_is_costs_next_to_nothing():
    """Each level claims 16,300 entries, and the decoder would make room for all of them before it found none."""
    data = b"\xdc\x3f\xac" * 1000
    data += b"\xc0" * (16384 - len(data))
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match="incomplete"):
            unpack(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 * len(data)
