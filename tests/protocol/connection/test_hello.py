"""Hello: valid ones travel unchanged, claims are bounded, unknown addresses are left out."""

import pytest

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.hello import Hello
from peerd.protocol.encoding.wire import MessageReader, encode_message
from peerd.protocol.errors import RemoteProtocolError

HELLO = Hello(
    agent="peerd/0.1.0",
    time_us=1_700_000_000_000_000,
    protocols=("/peerd/dht/1",),
    addresses=("/ip4/192.0.2.1/tcp/31330/ws", "/ip4/192.0.2.1/udp/31330/quic-v1"),
    observed_ip="2001:db8::1",
    roles=("serve",),
)


def test_a_hello_travels_unchanged():
    data = b"".join(encode_message(HELLO.to_header()))
    reader = MessageReader(0)
    reader.feed(data)
    assert Hello.from_header(reader.take().header) == HELLO


def test_addresses_of_a_kind_that_we_do_not_know_are_left_out():
    assert HELLO.multiaddrs == (Multiaddr.parse("/ip4/192.0.2.1/tcp/31330/ws"),)


def test_unknown_fields_are_ignored_and_missing_optional_ones_are_empty():
    assert Hello.from_header({"agent": "x", "time_us": 1, "mood": "good"}) == Hello("x", 1)


@pytest.mark.parametrize(
    "change",
    [
        {"agent": "x" * 65},
        {"agent": None},
        {"time_us": 1.5},
        {"time_us": -1},
        {"protocols": ["/x"] * 65},
        {"addresses": ["x" * 401]},
        {"observed_ip": "x" * 46},
        {"roles": "serve"},
        {"roles": [1]},
    ],
    ids=str,
)
def test_claims_beyond_their_limits_are_refused(change):
    with pytest.raises(RemoteProtocolError, match=f"hello: {next(iter(change))}"):
        Hello.from_header(HELLO.to_header() | change)


def test_agent_and_time_must_be_there():
    with pytest.raises(RemoteProtocolError, match="agent is missing"):
        Hello.from_header({"time_us": 1})
