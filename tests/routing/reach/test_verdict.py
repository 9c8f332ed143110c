"""What dial-backs show, what to announce because of it, and when to check again."""

from ipaddress import ip_address
from itertools import pairwise
from random import Random

import pytest

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.messages.dialback import Dialled, Outcome
from peerd.routing.reach.verdict import (
    Reach,
    Verdict,
    is_void,
    judge,
    more_judges,
    next_check_s,
    ports_for,
    whereabouts,
)

PORT = 31330


def at(host: str, port: int = PORT) -> Multiaddr:
    return Multiaddr("ip6" if ":" in host else "ip4", host, port)


def said(ip: str, *outcomes: Outcome) -> Dialled:
    return Dialled(ip_address(ip), outcomes)


OUT, LAN, LOOP = at("6.6.6.6"), at("192.168.1.2"), at("127.0.0.1")
PRIVATE = Verdict(Reach.PRIVATE, (), ((OUT, "silent"),))
PUBLIC = Verdict(Reach.PUBLIC, (OUT,))


@pytest.mark.parametrize(
    ("answers", "reach"),
    [
        ([], Reach.UNKNOWN),
        ([said("6.6.6.6", "reached")], Reach.PUBLIC),
        ([said("6.6.6.6", "silent")], Reach.PRIVATE),
        ([said("6.6.6.6", "reached"), said("6.6.6.6", "silent")], Reach.UNKNOWN),
        ([said("6.6.6.6", "reached"), said("6.6.6.6", "silent"), said("6.6.6.6", "refused")], Reach.PRIVATE),
        ([said("6.6.6.6", "wrong_peer"), said("6.6.6.6", "failed")], Reach.PRIVATE),
    ],
)
def test_the_majority_of_judges_decides(answers: list[Dialled], reach: Reach) -> None:
    assert judge(Verdict(), [((PORT,), answers)]).reach is reach


def test_divided_judges_change_nothing() -> None:
    divided = [((PORT,), [said("6.6.6.6", "reached"), said("6.6.6.6", "silent")])]
    assert judge(PUBLIC, divided) == PUBLIC
    assert judge(PRIVATE, divided) == PRIVATE


def test_no_answer_leaves_all_as_it_was() -> None:
    assert judge(PUBLIC, [((PORT,), [])]) == PUBLIC


def test_what_one_port_or_family_gives_is_enough() -> None:
    found = judge(
        Verdict(), [((PORT, 80), [said("6.6.6.6", "refused", "reached")]), ((1,), [said("2a00::1", "silent")])]
    )
    assert found == Verdict(Reach.PUBLIC, (at("6.6.6.6", 80),), ((OUT, "refused"), (at("2a00::1", 1), "silent")))


def test_the_internet_outranks_neighbours() -> None:
    found = judge(Verdict(), [((PORT,), [said("192.168.1.2", "reached")]), ((PORT,), [said("6.6.6.6", "silent")])])
    assert found == PRIVATE


def test_a_third_judge_is_asked_where_two_do_not_agree() -> None:
    silent, refused, reached = (said("6.6.6.6", outcome) for outcome in ("silent", "refused", "reached"))
    assert more_judges([]) == 2
    assert more_judges([silent]) == 1
    # They differ in why not.
    assert more_judges([silent, refused]) == 0
    assert more_judges([silent, reached]) == 1
    assert more_judges([silent, reached, reached]) == 0


@pytest.mark.parametrize(
    ("own", "verdict", "on_internet", "contacts", "addresses"),
    [
        # In a LAN, or on one machine, or alone: as it always was, even if a neighbour could not dial us just now.
        ([LAN, LOOP], Verdict(), False, [LAN, LOOP], [LAN, LOOP]),
        ([LAN, LOOP], Verdict(Reach.PUBLIC, (LAN,)), False, [LAN, LOOP], [LAN, LOOP]),
        ([LAN, LOOP], Verdict(Reach.PRIVATE, (), ((LAN, "silent"),)), False, [LAN, LOOP], [LAN, LOOP]),
        # Behind a NAT.
        ([LAN, LOOP], Verdict(), True, [], [LAN]),
        ([LAN, LOOP], PUBLIC, True, [OUT], [OUT, LAN]),
        ([LAN, LOOP], PRIVATE, True, [], [LAN]),
        # For programs on the same machine, which joins a swarm on the internet.
        ([LOOP], Verdict(), True, [], [LOOP]),
        ([LOOP], PRIVATE, True, [], [LOOP]),
        # With a public address of its own.
        ([OUT, LAN, LOOP], Verdict(), True, [OUT], [OUT, LAN]),
        ([OUT, LOOP], PUBLIC, True, [OUT], [OUT]),
        ([OUT, LOOP], PRIVATE, True, [], []),
        # Of two families, one is let through.
        ([OUT, at("2a00::1")], Verdict(Reach.PUBLIC, (OUT,), ((at("2a00::1"), "silent"),)), True, [OUT], [OUT]),
    ],
)
def test_what_is_announced(
    own: list[Multiaddr],
    verdict: Verdict,
    on_internet: bool,
    contacts: list[Multiaddr],
    addresses: list[Multiaddr],
) -> None:
    what = whereabouts(own, verdict, on_internet=on_internet)
    assert (list(what.contacts), list(what.addresses)) == (contacts, addresses)


@pytest.mark.parametrize(
    ("seen_at", "void"),
    [
        (["6.6.6.6"], False),
        (["6.6.6.6", "192.168.1.2"], False),
        (["7.7.7.7"], True),
        (["7.7.7.7", "192.168.1.2"], True),
        # The judges that could tell are not connected now.
        ([], False),
        (["192.168.1.2"], False),
        (["2a00::1"], False),
    ],
)
def test_what_was_proven_is_void_once_we_are_seen_elsewhere(seen_at: list[str], void: bool) -> None:
    assert is_void(PUBLIC, [ip_address(ip) for ip in seen_at]) is void
    assert not is_void(PRIVATE, [ip_address(ip) for ip in seen_at])


def test_ports_are_those_that_take_what_comes_from_there() -> None:
    listening = [
        at("0.0.0.0", 1),
        at("0.0.0.0", 1),
        at("127.0.0.1", 2),
        at("192.168.1.2", 3),
        at("::", 4),
        at("::1", 5),
    ]
    assert ports_for(ip_address("6.6.6.6"), listening) == (1, 3)
    assert ports_for(ip_address("127.0.0.1"), listening) == (1, 2)
    assert ports_for(ip_address("2a00::1"), listening) == (4,)
    assert len(ports_for(ip_address("6.6.6.6"), [at("0.0.0.0", port) for port in range(1, 20)])) == 4


@pytest.mark.parametrize("reach", list(Reach))
def test_looks_become_seldom_but_never_stop_and_never_meet(reach: Reach) -> None:
    waits = [[next_check_s(reach, unchanged, Random(seed)) for seed in range(20)] for unchanged in range(2000)]
    for before, after in pairwise(waits[:3]):
        assert sum(after) > sum(before)
    assert all(10 < wait < 2 * 3600 for row in waits for wait in row)
    assert len(set(waits[5])) == 20
