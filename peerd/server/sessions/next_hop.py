"""Dials the next hop of a session and shows it the ticket.

Only addresses that the next hop itself signed are dialled, if the policy for what that client names permits them, and
only a limited number in a minute for one client. Otherwise clients could aim us at our own network, or at others. For
the same reason a client learns that the next hop cannot be reached, but not why.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from peerd.net.connections import Connections, Stream
from peerd.net.dial_policy import DialPolicy
from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.schema import parse
from peerd.protocol.errors import CallerError, LinkFailed, Overloaded, PeerFault
from peerd.protocol.messages.session import LINK_FROM_DOWNSTREAM, LINK_PROTOCOL, Failure, Link, Linked, NextHop
from peerd.protocol.records.envelope import PeerRecord, SignedRecord, open_record

log = logging.getLogger(__name__)

# Dialling, and the next hop's wait for the client's `open`: a little more than its 10 s, so that its refusal is still
# heard.
LINK_DEADLINE_S = 12.0


@asynccontextmanager
async def open_link(
    connections: Connections,
    session: bytes,
    next_hop: NextHop,
    now: Callable[[], float],
    may_dial: Callable[[], bool] = lambda: True,
    *,
    policy: DialPolicy,
) -> AsyncIterator[tuple[Stream, Linked]]:
    """Yield the link to the next hop, and which steps that hop has. Raises LinkFailed.

    may_dial: called only if a dial is needed; returns whether another one may be made for this client.
    policy: which addresses the client may name.
    """
    try:
        with trio.fail_after(LINK_DEADLINE_S):
            stream = await _dial(connections, next_hop, now(), may_dial, policy)
            await stream.send(Link(session=session, ticket=next_hop.ticket).to_header())
    except (PeerFault, CallerError, Overloaded, trio.TooSlowError) as error:
        log.debug("a next hop cannot be reached: %r", error)
        raise LinkFailed("the next hop cannot be reached from here") from error
    async with stream:
        yield stream, await _answer(stream)


async def _dial(
    connections: Connections, next_hop: NextHop, now: float, may_dial: Callable[[], bool], policy: DialPolicy
) -> Stream:
    record = open_record(SignedRecord.decode(next_hop.record), now=now)
    if not isinstance(record.body, PeerRecord):
        raise LinkFailed("the next hop's record is not a peer record")
    if record.peer_id not in connections.live and record.peer_id != connections.peer_id and not may_dial():
        raise LinkFailed("too many next hops were dialled for this client in the last minutes")
    return await connections.open_stream(
        record.peer_id,
        LINK_PROTOCOL,
        addresses=record.body.ways_to(record.peer_id),
        priority=Priority.DECODE,
        policy=policy,
    )


async def _answer(stream: Stream) -> Linked:
    try:
        with trio.fail_after(LINK_DEADLINE_S):
            reply = parse((await stream.receive()).header, LINK_FROM_DOWNSTREAM)
    except (trio.TooSlowError, trio.EndOfChannel):
        raise LinkFailed(f"{stream.peer} did not take the link") from None
    except PeerFault as error:
        raise LinkFailed(f"{stream.peer}: {error}") from error
    if isinstance(reply, Failure):
        raise LinkFailed(f"{stream.peer}: {reply.error}")
    assert isinstance(reply, Linked)
    return reply
