"""Decides what follows from everything that can go wrong with a session's chain.

The hops' messages, the pace watch and the bridges report `News`. `consequences_of` looks up in one table what each
piece of news changes. `most_urgent` chooses the `Trouble` that the supervisor works on next. Both are pure functions of
values. A trouble may be over before its turn comes; `still_stands` tells.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peerd.client.session.hops.control_stream import ControlStream
from peerd.client.session.live_chain import LiveChain
from peerd.protocol.errors import CallerError, Evicted, LinkFailed, PeerdError, PeerFault, RelayLost
from peerd.protocol.span import Span


@dataclass(frozen=True, slots=True)
class HopLost:
    """A hop ended its part of the session, or broke it."""

    hop: ControlStream
    error: PeerdError


@dataclass(frozen=True, slots=True)
class HopRefuses:
    """A hop says that a step is wrong, or that its blocks gave NaN or infinity for it."""

    hop: ControlStream
    error: PeerdError


@dataclass(frozen=True, slots=True)
class Disagrees:
    """A hop's cache is not what the client thinks it is."""

    hop: ControlStream
    error: PeerdError


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """A step was never answered, and no hop is known to be the cause."""

    error: PeerdError


@dataclass(frozen=True, slots=True)
class HopHangs:
    """A hop hangs, or is too slow, while the client waits for step `seq`."""

    hop: ControlStream
    seq: int


@dataclass(frozen=True, slots=True)
class LinkBroken:
    """The results that this hop sends do not arrive at the next hop."""

    hop: ControlStream


@dataclass(frozen=True, slots=True)
class BridgeIdle:
    """The client has bridged this hop's results for a while: there may be a better route by now."""

    hop: ControlStream


@dataclass(frozen=True, slots=True)
class Fatal:
    """The session cannot go on with its pending steps."""

    error: PeerdError


@dataclass(frozen=True, slots=True)
class Hole:
    """No hop runs these blocks."""

    blocks: Span


@dataclass(frozen=True, slots=True)
class Behind:
    """The chain is whole, but its first hop may lack steps."""


News = HopRefuses | HopLost | Disagrees | NoAnswer | HopHangs | LinkBroken | BridgeIdle
# What waits for the supervisor in its queue; it sees holes, and that the first hop is behind, by looking at the chain.
Queued = Fatal | HopHangs | LinkBroken | BridgeIdle
Trouble = Queued | Hole | Behind


@dataclass(frozen=True, slots=True)
class Consequences:
    """What a piece of news changes.

    is_blamed: the hop broke a promise, and every session leaves it out for a while. is_avoided: this session alone
    does. drops_hop: the hop leaves the chain. drops_all: every hop does. is_queued: the news waits for the supervisor
    as it is. waits_for_work: the supervisor need not look before there are steps to send.
    """

    is_blamed: bool = False
    is_avoided: bool = False
    drops_hop: bool = False
    drops_all: bool = False
    waits_for_work: bool = False


# The first row that fits the news and its error decides.
_CONSEQUENCES: tuple[tuple[type, type, Consequences], ...] = (
    # The peer itself may be well, and reachable through another relay: for its own blocks it is as good as any other.
    (HopLost, RelayLost, Consequences(drops_hop=True)),
    (HopLost, PeerFault, Consequences(drops_hop=True, is_blamed=True)),
    # A hop evicts a session that sends nothing for long. The hop is opened again with the next step.
    (HopLost, Evicted, Consequences(drops_hop=True, waits_for_work=True)),
    (HopLost, PeerdError, Consequences(drops_hop=True, is_avoided=True)),
    # One hop alone may be broken, or lie, or be fed by a liar; and the same blocks in another dtype may do better.
    (HopRefuses, PeerdError, Consequences(drops_hop=True)),
    # Only a new chain is sure to agree with the client.
    (Disagrees, PeerdError, Consequences(drops_all=True)),
    (NoAnswer, PeerdError, Consequences(drops_all=True)),
    # These wait in the supervisor's queue.
    (HopHangs, object, Consequences()),
    (LinkBroken, object, Consequences()),
    (BridgeIdle, object, Consequences()),
)

# Most urgent first. Hops are only overtaken, and bridges ended, while steps can be sent.
_URGENCY: tuple[type, ...] = (Fatal, Hole, LinkBroken, Behind, HopHangs, BridgeIdle)


def consequences_of(news: News) -> Consequences:
    """What the news changes."""
    error = getattr(news, "error", None)
    return next(
        consequences
        for kind, cause, consequences in _CONSEQUENCES
        if isinstance(news, kind) and isinstance(error, cause)
    )


def most_urgent(queued: Iterable[Queued], holes: Iterable[Span], *, is_ready: bool) -> Trouble | None:
    """The trouble to work on next; None if nothing is wrong. `is_ready`: whether steps may be sent."""
    troubles: list[Trouble] = [*queued, *map(Hole, holes)]
    if not is_ready:
        troubles.append(Behind())
    return min(troubles, key=lambda trouble: _URGENCY.index(type(trouble)), default=None)


def still_stands(trouble: HopHangs | LinkBroken | BridgeIdle, chain: LiveChain, oldest_seq: int | None) -> bool:
    """Whether the trouble still needs work. oldest_seq: the step that the client waits for."""
    match trouble:
        case HopHangs(_, seq):
            return seq == oldest_seq
        case LinkBroken(hop):
            return hop in chain and not chain.route(hop).is_bridged and chain.after(hop.hop.span.end) is not None
        case BridgeIdle(hop):
            return hop in chain and chain.route(hop).is_bridged


def ends_chain(error: PeerdError) -> bool:
    """Whether open hops are of no use after steps failed with this error, because they would fail the next step too."""
    return isinstance(error, CallerError | LinkFailed)
