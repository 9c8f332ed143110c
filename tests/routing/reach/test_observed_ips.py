"""Our observed addresses: how many witnesses must agree, and which peers count as one."""

from ipaddress import ip_address

from peerd.protocol.identity import Identity
from peerd.routing.reach.observed_ips import ObservedIps

PEERS = [Identity.from_seed(bytes([n]) * 32).peer_id for n in range(1, 7)]
HERE, THERE = "6.6.6.6", "7.7.7.7"


def observed(*views: tuple[str | None, str | None]) -> list[str]:
    ips = ObservedIps()
    for peer, (at, seen) in zip(PEERS, views, strict=False):
        ips.note(peer, ip_address(at) if at else None, ip_address(seen) if seen else None)
    return [str(ip) for ip in ips.agreed()]


def test_nobody_has_said_anything() -> None:
    assert observed() == []


def test_the_only_peer_is_believed() -> None:
    assert observed(("5.1.1.1", HERE)) == [HERE]


def test_peers_of_one_network_are_one_witness() -> None:
    assert observed(("5.1.1.1", THERE), ("5.1.1.2", THERE), ("5.2.2.2", HERE), ("5.3.3.3", HERE)) == [HERE]


def test_two_peers_that_disagree_are_both_not_believed() -> None:
    assert observed(("5.1.1.1", HERE), ("5.2.2.2", THERE)) == []


def test_the_majority_is_believed() -> None:
    assert observed(("5.1.1.1", HERE), ("5.2.2.2", THERE), ("5.3.3.3", HERE)) == [HERE]


def test_neighbours_and_the_internet_see_us_elsewhere_and_both_are_right() -> None:
    assert observed(("192.168.1.9", "192.168.1.2"), ("5.2.2.2", HERE), ("5.3.3.3", HERE)) == [HERE, "192.168.1.2"]


def test_each_family_has_its_address() -> None:
    assert observed(("5.1.1.1", HERE), ("2a00::1", "2a01::6")) == [HERE, "2a01::6"]


def test_a_relayed_peer_sees_us_nowhere() -> None:
    assert observed((None, HERE), ("5.1.1.1", None), ("5.2.2.2", "0.0.0.0")) == []


def test_what_a_proxy_sees_is_no_view_of_us() -> None:
    assert observed(("5.1.1.1", "127.0.0.1"), ("5.2.2.2", "10.0.0.3")) == []


def test_a_peer_that_is_gone_or_says_otherwise_no_longer_counts() -> None:
    ips = ObservedIps()
    for peer, at, seen in ((PEERS[0], "5.1.1.1", HERE), (PEERS[1], "5.2.2.2", THERE)):
        ips.note(peer, ip_address(at), ip_address(seen))
    ips.forget(PEERS[0])
    assert [str(ip) for ip in ips.agreed()] == [THERE]
    ips.note(PEERS[1], ip_address("5.2.2.2"), ip_address(HERE))
    assert [str(ip) for ip in ips.agreed()] == [HERE]
    ips.forget(PEERS[1])
    assert ips.agreed() == ()
