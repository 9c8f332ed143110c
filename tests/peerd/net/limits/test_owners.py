"""In whose quota a peer's usage counts: that of its key and that of its public network."""

from ipaddress import ip_address

import pytest

from peerd.net.limits.owners import Owner, Tally
from peerd.net.limits.rates import Rates
from peerd.protocol.identity import PeerId


def at(name, ip):
    return Owner.at(PeerId(name), ip_address(ip) if ip else None)


@pytest.mark.parametrize(
    ("one", "two", "is_same"),
    [
        ("8.8.8.1", "8.8.8.200", True),
        ("8.8.8.1", "8.8.9.1", False),
        ("2600:1:2:3::1", "2600:1:2:ffff::1", True),
        ("2600:1:2::1", "2600:1:3::1", False),
        ("::ffff:8.8.8.1", "8.8.8.9", True),
    ],
)
def test_keys_of_one_public_network_share_what_it_may_have(one, two, is_same):
    tally = Tally()
    tally.add(at("a", one), 3)
    assert tally.of_network(at("b", two)) == (3 if is_same else 0)
    assert (at("a", one).share == at("b", two).share) is is_same


@pytest.mark.parametrize("ip", ["127.0.0.1", "10.1.2.3", "192.168.0.7", "fd00::1", ""])
def test_keys_that_are_not_on_the_public_internet_count_alone(ip):
    tally = Tally()
    tally.add(at("a", ip), 3)
    assert tally.of_network(at("a", ip)) == 0
    assert tally.has_room(at("b", ip), 3, a_peer=3, a_network=0 + 3)
    assert not tally.has_room(at("a", ip), 1, a_peer=3, a_network=3)
    assert at("a", ip).share != at("b", ip).share


def test_what_is_given_back_leaves_nothing():
    tally = Tally()
    for name in "abc":
        tally.add(at(name, "8.8.8.8"), 2)
    for name in "abc":
        tally.add(at(name, "8.8.8.8"), -2)
    assert (tally.total, repr(tally)) == (0, "<Tally 0 of 0 peers>")


def test_new_keys_bring_a_network_no_more_turns():
    rates = Rates(1, 4, network_factor=2)
    assert [rates.may(at(str(n), "8.8.8.8"), 0) for n in range(12)] == [True] * 8 + [False] * 4
    assert [rates.may(at("x", "127.0.0.1"), 0) for _ in range(6)] == [True] * 4 + [False] * 2
    # A network that had enough does not use up its keys' own.
    assert rates.may(at("11", "9.9.9.9"), 0)


def test_keys_that_weigh_more_give_their_network_no_more_turns():
    ip = ip_address("8.8.8.8")
    stranger, giver = Owner.at(PeerId("a"), ip), Owner.at(PeerId("b"), ip, weight=8.0)
    assert stranger.share == giver.share == Owner.at(PeerId("d"), ip, weight=8.0).share
    assert giver.share != Owner.at(PeerId("b"), ip_address("9.8.8.8"), weight=8.0).share
    # What it may hold does not change with its weight.
    assert giver == Owner.at(PeerId("b"), ip)
