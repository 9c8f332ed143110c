"""Whether others can dial us, and what to announce because of it: the decisions.

Knows what peers found when they dialled us back and what we listen on; asks nobody (`peerd.reach.checker` does).
The difficulty is what to say while nobody knows. A swarm in one LAN or on one machine works with the addresses of
its interfaces, so those are announced until somebody sees us at a public address that is not among them: from then
on we stand behind a NAT, and are in nobody's table before a dial-back has shown that we can be dialled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random

from peerd.protocol.addresses import IpAddress, Multiaddr, is_private_ip
from peerd.protocol.messages.dialback import MAX_PORTS, Dialled, Outcome, dial_address

# Peers that dial us for one verdict, and one more where they do not agree.
JUDGES = 2
# Until the next look. Judges try again after a minute: a verdict that was load's doing, ours or theirs, is mended soon,
# and a port that is forwarded noticed. One that works goes on working, mostly.
_FIRST_CHECK_S = {"unknown": 15.0, "private": 80.0, "public": 900.0}
_LONGEST_CHECK_S = {"unknown": 240.0, "private": 3600.0, "public": 3600.0}
_JITTER = 0.2


class Reach(Enum):
    """Who can dial us."""

    UNKNOWN = "unknown"
    """Nobody has tried."""
    PUBLIC = "public"
    """Whoever could try, could."""
    PRIVATE = "private"
    """Nobody: a NAT or firewall stands between. We can only dial."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What dial-backs showed. `proven`: where we were reached. `failed`: where we were not, and why not."""

    reach: Reach = Reach.UNKNOWN
    proven: tuple[Multiaddr, ...] = ()
    failed: tuple[tuple[Multiaddr, Outcome], ...] = ()


@dataclass(frozen=True, slots=True)
class Announced:
    """contacts: what the DHT's tables hold of us; none: we are its client. addresses: what our peer record says."""

    contacts: tuple[Multiaddr, ...]
    addresses: tuple[Multiaddr, ...]


def ports_for(ip: IpAddress, listening: Iterable[Multiaddr]) -> tuple[int, ...]:
    """On which ports somebody who sees us at `ip` may find us: of its family, and not for this machine alone."""
    ports = (
        address.port
        for address in listening
        if address.ip is not None
        and address.ip.version == ip.version
        and (address.is_wildcard or address.is_loopback == ip.is_loopback)
    )
    return tuple(dict.fromkeys(ports))[:MAX_PORTS]


def more_judges(answers: Sequence[Dialled]) -> int:
    """How many more to ask about the same ports: two in all, and a third where those found different things."""
    if len(answers) < JUDGES:
        return JUDGES - len(answers)
    found = {tuple(outcome == "reached" for outcome in answer.outcomes) for answer in answers}
    return int(len(answers) == JUDGES and len(found) > 1)


def find(before: Finding, trials: Iterable[tuple[tuple[int, ...], Sequence[Dialled]]]) -> Finding:
    """What the answers to one round of questions show together; `trials`: ports, and what judges found at them.

    Answers from public addresses outrank those from our own network. Where judges are divided, all stays as it was.
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
        return Finding(Reach.PUBLIC, tuple(proven), tuple(failed))
    if divided or not failed:
        return before
    return Finding(Reach.PRIVATE, (), tuple(failed))


def is_void(finding: Finding, seen_at: Sequence[IpAddress]) -> bool:
    """Whether what was proven says nothing any more: where we were reached is not where we are seen now."""
    for address in finding.proven:
        ip = address.ip
        assert ip is not None
        like = [now for now in seen_at if now.version == ip.version and is_private_ip(now) == is_private_ip(ip)]
        if like and ip not in like:
            return True
    return False


def announced(own: Sequence[Multiaddr], finding: Finding, *, on_internet: bool) -> Announced:
    """What to announce. own: what we listen on, as our network writes it. on_internet: our swarm is there."""
    failed = {address for address, _ in finding.failed}
    left = [address for address in own if address.with_peer(None) not in failed]
    private = finding.reach is Reach.PRIVATE
    if not on_internet:
        # No NAT stands between neighbours; one that was too busy to answer must not fall out of its swarm for it.
        return Announced(tuple(own), tuple(own))
    # Neighbours in the same LAN need no way round; nobody else dials such addresses. Loopback helps none of them, but
    # who listens nowhere else means those on the same machine.
    near = [address for address in left if address.is_private and not address.is_loopback]
    if all(address.is_loopback for address in own):
        near = list(own)
    if private:
        return Announced((), tuple(near))
    direct = dict.fromkeys((*finding.proven, *(address for address in left if not address.is_private)))
    return Announced(tuple(direct), (*direct, *near))


def next_check_s(reach: Reach, unchanged: int, random: Random) -> float:
    """Seconds to the next round of questions; `unchanged`: how many have found the same."""
    first, longest = _FIRST_CHECK_S[reach.value], _LONGEST_CHECK_S[reach.value]
    return min(first * 2.0 ** min(unchanged, 10), longest) * random.uniform(1 - _JITTER, 1 + _JITTER)
