"""Rates of owners: a peer's own, and that of its network."""

from peerd.net.limits.owners import Owner
from peerd.net.limits.rates import Rates
from peerd.protocol.identity import PeerId

ONE, OTHER = (Owner(PeerId(name), "8.8.8.0/24") for name in ("one", "other"))


def test_a_peer_beyond_its_own_rate_does_not_use_up_its_networks():
    rates = Rates(8, 128, network_factor=2)
    assert sum(rates.may(ONE, 0.0) for _ in range(1000)) == 128
    assert sum(rates.may(OTHER, 0.0) for _ in range(1000)) == 128


def test_all_peers_of_a_network_together_have_its_rate():
    rates = Rates(8, 128, network_factor=2)
    peers = [Owner(PeerId(str(number)), "8.8.8.0/24") for number in range(10)]
    assert sum(rates.may(peer, 0.0) for peer in peers for _ in range(100)) == 256
    assert rates.may(Owner(PeerId("far"), "9.9.9.0/24"), 0.0)
