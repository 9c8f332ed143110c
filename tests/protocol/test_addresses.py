import json
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.protocol.addresses import MAX_ADDRESS_CHARS, Multiaddr, is_private_ip
from peerd.protocol.identity import PeerId, peer_id_of

VECTORS = json.loads((Path(__file__).parents[2] / "spec/vectors/connection/addresses.json").read_text())["addresses"]
VALID = [case for case in VECTORS if "error" not in case]
INVALID = [case for case in VECTORS if "error" in case]
PEER, RELAY = peer_id_of(bytes(32)), peer_id_of(bytes(31) + b"\x01")


@pytest.mark.parametrize("case", VALID, ids=lambda case: case["text"])
def test_an_address_is_read_and_written_back(case):
    address = Multiaddr.parse(case["text"])
    assert str(address) == case["text"]
    for name in case.keys() - {"text"}:
        assert getattr(address, name) == case[name], name


@pytest.mark.parametrize("case", INVALID, ids=lambda case: case["name"])
def test_what_is_no_address_of_ours_is_refused(case):
    with pytest.raises(ValueError, match="address"):
        Multiaddr.parse(case["text"])


def test_the_refusal_says_what_is_allowed():
    with pytest.raises(ValueError, match=r"/ip4\|ip6\|dns4\|dns6\|dns/HOST/tcp/PORT/ws\|wss"):
        Multiaddr.parse("/ip4/192.0.2.1/udp/31330/quic-v1")
    with pytest.raises(ValueError, match="which is '::1'"):
        Multiaddr.parse("/ip6/0::1/tcp/31330/ws")


def test_the_longest_address_fits_the_limit():
    longest = max((case["text"] for case in VALID), key=len)
    assert len(longest) == MAX_ADDRESS_CHARS - 1


def test_a_peer_can_be_put_on_an_address_and_taken_off():
    address = Multiaddr("ip4", "192.0.2.1", 31330)
    named = address.with_peer(PEER)
    assert str(named) == f"/ip4/192.0.2.1/tcp/31330/ws/p2p/{PEER}"
    assert named.with_peer(None) == address


def test_a_relayed_address_dials_the_relay():
    address = Multiaddr("dns", "relay.example", 443, secure=True, peer_id=PEER, relay=RELAY)
    assert address.url == "wss://relay.example:443/"
    assert Multiaddr.parse(str(address)) == address


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "unix"},
        {"host": "192.0.2.01"},
        {"port": 65536},
        {"port": -1},
        {"peer_id": PeerId("me")},
        {"relay": PeerId("me")},
    ],
    ids=str,
)
def test_an_address_cannot_be_built_wrong_either(wrong):
    with pytest.raises(ValueError, match=r"host|port|canonical|PeerId|[Ll]eading"):
        Multiaddr(**({"kind": "ip4", "host": "192.0.2.1", "port": 31330} | wrong))


@pytest.mark.parametrize(
    ("ip", "private"),
    [
        ("8.8.8.8", False),
        ("2606:4700::1111", False),
        ("10.1.2.3", True),
        ("127.0.0.1", True),
        ("169.254.169.254", True),
        ("100.64.0.1", True),
        ("224.0.0.1", True),
        ("0.0.0.0", True),
        ("::1", True),
        ("fd00::1", True),
        ("ff02::1", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:8.8.8.8", False),
        ("64:ff9b::a9fe:a9fe", True),
        ("64:ff9b::808:808", False),
        ("2002:a00:1::", True),
    ],
)
def test_a_private_address_cannot_hide_inside_another(ip, private):
    assert is_private_ip(ip_address(ip)) is private


PARTS = ["ip4", "ip6", "dns", "127.0.0.1", "::1", "localhost", "tcp", "80", "ws", "wss", "p2p", PEER, "p2p-circuit", ""]


@settings(derandomize=True, max_examples=400)
@given(st.text(max_size=450) | st.lists(st.sampled_from(PARTS) | st.text(max_size=5), max_size=12).map("/".join))
def test_any_text_is_an_address_in_canonical_form_or_a_value_error(text):
    for candidate in (text, "/" + text, "/ip4/127.0.0.1/tcp/80/ws/" + text):
        try:
            address = Multiaddr.parse(candidate)
        except ValueError:
            continue
        assert str(address) == candidate
