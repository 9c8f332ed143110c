"""The dial-back messages against the vectors, and which addresses may be dialled."""

import json
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.protocol.addresses import Multiaddr, canonical_ip, is_private_ip, private_range, public_network
from peerd.protocol.encoding.packing import pack, unpack
from peerd.protocol.encoding.schema import parse
from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.messages.dialback import MAX_PORTS, Dialled, DialMe, dial_address, may_dial

VECTORS = json.loads((Path(__file__).parents[3] / "spec/vectors/discovery/reachability.json").read_text())
KINDS = {"question": DialMe, "answer": Dialled}
IPS = st.ip_addresses()


@pytest.mark.parametrize("vector", VECTORS["messages"], ids=lambda vector: vector["name"])
def test_messages_are_read_as_the_vectors_say(vector):
    header = unpack(bytes.fromhex(vector["header"]))
    if "error" in vector:
        with pytest.raises(RemoteProtocolError) as caught:
            parse(header, (KINDS[vector["kind"]],))
        assert caught.value.code == vector["error"]
        return
    message = parse(header, (KINDS[vector["kind"]],))
    assert message.to_header() == vector["fields"]
    assert pack(message.to_header()).hex() == vector["header"]


@pytest.mark.parametrize("vector", VECTORS["may_dial"], ids=lambda vector: vector["name"])
def test_the_asking_peer_is_dialled_as_the_vectors_say(vector):
    ours = [Multiaddr.parse(address) for address in vector["announced"]]
    assert may_dial(ip_address(vector["ip"]), ours) is vector["dialled"]


def test_a_peer_whose_address_we_cannot_see_is_not_dialled():
    assert not may_dial(None, [Multiaddr.parse("/ip4/5.1.1.1/tcp/1/ws")])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2**17) | st.text(max_size=50) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(derandomize=True, max_examples=300)
@given(st.sampled_from(["dial_me", "dialled", "error"]), VALUES, VALUES, VALUES)
def test_any_fields_make_a_message_or_are_refused(kind, ports, ip, outcomes):
    header = {"type": kind, "ports": ports, "ip": ip, "outcomes": outcomes}
    try:
        message = parse(header, (DialMe, Dialled))
    except RemoteProtocolError:
        return
    assert isinstance(message, DialMe | Dialled)
    assert message == type(message).from_header(message.to_header())
    assert len(message.ports if isinstance(message, DialMe) else message.outcomes) <= MAX_PORTS


@settings(derandomize=True, max_examples=300)
@given(IPS, st.integers(1, 65535))
def test_every_address_has_one_network_at_most_and_can_be_written_down(ip, port):
    ip = canonical_ip(str(ip))
    assert not (public_network(ip) and private_range(ip))
    assert (public_network(ip) is None) == is_private_ip(ip)
    assert dial_address(ip, port).ip == ip


@settings(derandomize=True, max_examples=300)
@given(IPS)
def test_a_public_peer_dials_public_addresses_only(ip):
    ours = [Multiaddr.parse("/ip4/5.1.1.1/tcp/1/ws"), Multiaddr.parse("/ip4/10.0.0.1/tcp/1/ws")]
    assert not (may_dial(canonical_ip(str(ip)), ours) and is_private_ip(ip))


@pytest.mark.parametrize("text", ["", "1.2.3", "peer.example", "fe80::1%eth0", "01.2.3.4", "1.2.3.4/32"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match=r".*"):
        canonical_ip(text)


def test_an_ipv4_address_inside_ipv6_is_the_ipv4_address():
    assert str(canonical_ip("::ffff:10.0.0.1")) == "10.0.0.1"
