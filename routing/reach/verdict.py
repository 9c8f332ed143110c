"""Decides whether other peers can dial us, and what to announce because of it.

Judges from the results of dial-backs and from the addresses that we listen on; `peerd.reach.checker` asks the peers.
A swarm in one LAN or on one machine works with the addresses of its interfaces, so those are announced until a peer
sees us at a public address that is not among them. From then on we count as standing behind a NAT, and stay out of
the DHT's tables until a dial-back has shown that we can be dialled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random

from peerd.protocol.addresses import IpAddress, Multiaddr, is_private_ip
from peerd.protocol.messages.dialback import MAX_PORTS, Dialled, Outcome, dial_address

# How many peers dial us back for one verdict; a third peer is asked if they disagree.
JUDGES = 2
# Seconds to the next check. After "private" we check again within a minute or so, because the cause may have been load,
# ours or the judge's, or because the user has forwarded a port since. A port that works mostly goes on working.
_FIRST_CHECK_S = {"unknown": 15.0, "private": 80.0, "public": 900.0}
_LONGEST_CHECK_S = {"unknown": 240.0, "private": 3600.0, "public": 3600.0}
_JITTER = 0.2


class Reach(Enum):
    """Whether other peers can dial us."""

    UNKNOWN = "unknown"
    """No peer has tried."""
    PUBLIC = "public"
    """Every peer that tried could dial us."""
    PRIVATE = "private"
    """No peer could: a NAT or firewall stands between. We can only dial others."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of dial-backs. `proven`: addresses at which we were reached. `failed`: addresses at which we were not,
    and how the dial ended.
    """

    reach: Reach = Reach.UNKNOWN
    proven: tuple[Multiaddr, ...] = ()
    failed: tuple[tuple[Multiaddr, Outcome], ...] = ()


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """What we tell others about ourselves.

    contacts: addresses for the DHT's tables; if empty, we are only a client of the DHT.
    addresses: addresses for our peer record.
    relays: addresses of the relays that reach us, each with its relay's PeerId.
    """

    contacts: tuple[Multiaddr, ...] = ()
    addresses: tuple[Multiaddr, ...] = ()
    relays: tuple[Multiaddr, ...] = ()

    @classmethod
    def at(cls, addresses: Iterable[Multiaddr]) -> Whereabouts:
        """Of a peer that everybody can dial at `addresses`."""
        known = tuple(addresses)
        return cls(known, known)


def ports_for(ip: IpAddress, listening: Iterable[Multiaddr]) -> tuple[int, ...]:
    """The ports at which a peer that sees us at `ip` may reach us: those of its IP version, loopback only for
    loopback.
    """
    ports = (
        address.port
        for address in listening
        if address.ip is not None
        and address.ip.version == ip.version
        and (address.is_wildcard or address.is_loopback == ip.is_loopback)
    )
    return tuple(dict.fromkeys(ports))[:MAX_PORTS]


def more_judges(answers: Sequence[Dialled]) -> int:
    """How many more judges to ask about the same ports: two in all, and a third if the two found different things."""
    if len(answers) < JUDGES:
        return JUDGES - len(answers)
    found = {tuple(outcome == "reached" for outcome in answer.outcomes) for answer in answers}
    return int(len(answers) == JUDGES and len(found) > 1)


def judge(before: Verdict, trials: Iterable[tuple[tuple[int, ...], Sequence[Dialled]]]) -> Verdict:
    """Combine the answers to one round of dial-back requests.

    trials: pairs of ports, and the answers of the judges that dialled them.

    Answers from public addresses outrank those from our own network. If the judges disagree, `before` stays.
    """
    rounds = [(ports, answers) for ports, answers in trials if answers]
    if any(not is_private_ip(answers[0].ip) for _, answers in rounds):
        rounds = [(ports, answers) for ports, answers in rounds if not is_private_ip(answers[0].ip)]
    proven: list[Multiaddr] = []
    failed: list[tuple[Multiaddr, Outcome]] = []
    divided = False
    for ports, answers in rounds:
        for index, port in enumerate(ports):
            counts = Counter(answer.outcomes[index] for answer in answers)
            reached, missed = counts["reached"], len(answers) - counts["reached"]
            address = dial_address(answers[0].ip, port)
            if reached > missed:
                proven.append(address)
            elif missed > reached:
                del counts["reached"]
                failed.append((address, counts.most_common(1)[0][0]))
            else:
                divided = True
    if proven:
        return Verdict(Reach.PUBLIC, tuple(proven), tuple(failed))
    if divided or not failed:
        return before
    return Verdict(Reach.PRIVATE, (), tuple(failed))


def is_void(verdict: Verdict, seen_at: Sequence[IpAddress]) -> bool:
    """Whether a verdict is out of date: the address at which we were reached is not one at which we are seen now."""
    for address in verdict.proven:
        ip = address.ip
        assert ip is not None
        like = [now for now in seen_at if now.version == ip.version and is_private_ip(now) == is_private_ip(ip)]
        if like and ip not in like:
            return True
    return False


def whereabouts(own: Sequence[Multiaddr], verdict: Verdict, *, on_internet: bool) -> Whereabouts:
    """What to announce.

    own: the addresses that we listen on.
    on_internet: whether our swarm is on the internet rather than in one local network.
    """
    failed = {address for address, _ in verdict.failed}
    left = [address for address in own if address.with_peer(None) not in failed]
    private = verdict.reach is Reach.PRIVATE
    if not on_internet:
        # No NAT stands between neighbours. A peer that was too busy to answer a dial-back must not drop out for that.
        return Whereabouts(tuple(own), tuple(own))
    # Neighbours in the same LAN reach us directly, and no other peer dials such addresses. A loopback address is no use
    # to them, but if we listen on nothing else, our swarm is on this machine.
    near = [address for address in left if address.is_private and not address.is_loopback]
    if all(address.is_loopback for address in own):
        near = list(own)
    if private:
        return Whereabouts((), tuple(near))
    direct = dict.fromkeys((*verdict.proven, *(address for address in left if not address.is_private)))
    return Whereabouts(tuple(direct), (*direct, *near))


def next_check_s(reach: Reach, unchanged: int, random: Random) -> float:
    """Seconds to the next round of dial-backs. `unchanged`: how many rounds in a row had the same result."""
    first, longest = _FIRST_CHECK_S[reach.value], _LONGEST_CHECK_S[reach.value]
    return min(first * 2.0 ** min(unchanged, 10), longest) * random.uniform(1 - _JITTER, 1 + _JITTER)
