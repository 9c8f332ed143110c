"""Dials the next hop of a session and shows it the ticket.

Knows whose addresses may be dialled on a client's word: only those that the next hop itself signed, and
private ones only by a peer that listens in such a range, or a client could aim us at our own network.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from peerd.net.connections import Connections, Stream
from peerd.net.dialling.dialable import _located, dialable
from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.schema import parse
from peerd.protocol.errors import CallerError, LinkFailed, Overloaded, PeerFault
from peerd.protocol.messages.session import LINK_FROM_DOWNSTREAM, LINK_PROTOCOL, Failure, Link, Linked, NextHop
from peerd.protocol.records.envelope import PeerRecord, SignedRecord, open_record

# Dialling, and the next hop's wait for the client's `open`: a little more than its 10 s, so that its refusal is still
# heard.
LINK_DEADLINE_S = 12.0


@asynccontextmanager
async def open_link(
    connections: Connections, session: bytes, next_hop: NextHop, now: Callable[[], float]
) -> AsyncIterator[tuple[Stream, Linked]]:
    """Yield the link to the next hop, and which steps that hop has. Raises LinkFailed, saying why."""
    try:
        with trio.fail_after(LINK_DEADLINE_S):
            stream = await _dial(connections, next_hop, now())
            await stream.send(Link(session=session, ticket=next_hop.ticket).to_header())
    except trio.TooSlowError:
        raise LinkFailed(f"the next hop did not answer within {LINK_DEADLINE_S:g} s") from None
    except (PeerFault, CallerError, Overloaded) as error:
        raise LinkFailed(str(error)) from error
    async with stream:
        yield stream, await _answer(stream)


async def _dial(connections: Connections, next_hop: NextHop, now: float) -> Stream:
    record = open_record(SignedRecord.decode(next_hop.record), now=now)
    if not isinstance(record.body, PeerRecord):
        raise LinkFailed("the next hop's record is not a peer record")
    ours = connections.listen_addresses
    allowed = dialable(await _located(dialable(record.body.ways_to(record.peer_id), ours), ours), ours)
    return await connections.open_stream(record.peer_id, LINK_PROTOCOL, addresses=allowed, priority=Priority.DECODE)


async def _answer(stream: Stream) -> Linked:
    try:
        with trio.fail_after(LINK_DEADLINE_S):
            said = parse((await stream.receive()).header, LINK_FROM_DOWNSTREAM)
    except (trio.TooSlowError, trio.EndOfChannel):
        raise LinkFailed(f"{stream.peer} did not take the link") from None
    except PeerFault as error:
        raise LinkFailed(f"{stream.peer}: {error}") from error
    if isinstance(said, Failure):
        raise LinkFailed(f"{stream.peer}: {said.error}")
    assert isinstance(said, Linked)
    return said
