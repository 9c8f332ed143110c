"""Feeds sessions from their streams: the client's control stream, and those beside it.

Links from upstream hops, adapters' uploads and questions on progress are streams of their own. Each names its session
in its first message, and ends with the session.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from peerd.exchange.adapter_upload import UPLOAD_DEADLINE_S
from peerd.exchange.first_message import first_message
from peerd.exchange.refusals import finish, refuse
from peerd.net.connections import Stream
from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.schema import parse
from peerd.protocol.errors import Evicted, InvalidRequest, Overloaded, PeerdError, RemoteProtocolError
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.adapters import Loaded, Upload
from peerd.protocol.messages.audits import Copy
from peerd.protocol.messages.drawing import Draw, Sampling
from peerd.protocol.messages.receipts import Acknowledge
from peerd.protocol.messages.session import (
    CONTROL_FROM_CLIENT,
    LINK_FROM_UPSTREAM,
    REPLAY_SEQ,
    Ask,
    Bridge,
    Failure,
    Link,
    Linked,
    Route,
    Step,
)
from peerd.server.sessions.hosted_session import HostedSession
from peerd.server.sessions.session_table import HostedSessions


class SessionStreams:
    """Feeds admitted sessions from their other streams. `own_id` returns our PeerId, which tickets name."""

    def __init__(self, sessions: HostedSessions, own_id: Callable[[], PeerId]) -> None:
        self._sessions = sessions
        self._own_id = own_id

    async def handle_link(self, stream: Stream) -> None:
        """Serve a link from an upstream hop: a ticket, then steps until it ends or another link supersedes it."""
        try:
            link = await first_message(stream, (Link,))
            session, epoch = await self._sessions.of_link(link, stream.peer, self._own_id())
            superseded = session.take_over(epoch)
            with superseded:
                await stream.send(Linked(taken=session.taken).to_header())
                while True:
                    await session.wait_for_room()
                    raw = await stream.receive(session.max_body)
                    session.accept(parse(raw.header, LINK_FROM_UPSTREAM), raw.body)
            # The link was superseded, or the session ended: either way this link is of no more use.
            stream.reset("superseded")
        except trio.EndOfChannel:
            return
        except PeerdError as error:
            await refuse(stream, Failure.of, error)

    async def handle_upload(self, stream: Stream) -> None:
        """Receive a client's own adapter for a session of that client which is open here."""
        try:
            with trio.fail_after(UPLOAD_DEADLINE_S):
                upload = await first_message(stream, (Upload,))
                session = self._sessions.admitted((stream.peer, upload.session, upload.hop))
                if session is None:
                    raise InvalidRequest("no such session of yours is open here")
                await session.take_adapter(stream, upload)
            await stream.send(Loaded().to_header())
            await finish(stream)
        except trio.TooSlowError:
            await refuse(stream, Failure.of, Overloaded(f"the adapter did not come within {UPLOAD_DEADLINE_S:g} s"))
        except PeerdError as error:
            await refuse(stream, Failure.of, error)
        except trio.EndOfChannel:
            return

    async def handle_ask(self, stream: Stream) -> None:
        """Answer how far a client's session is. It has its own stream, so no step that waits for memory is in front of
        it.
        """
        try:
            ask = await first_message(stream, (Ask,))
            session = self._sessions.admitted((stream.peer, ask.session, ask.hop))
            if session is None:
                raise Evicted("no such session of yours is open here")
            stream.send_nowait(session.progress.to_header(), priority=Priority.CONTROL)
            await finish(stream)
        except PeerdError as error:
            await refuse(stream, Failure.of, error)
        except trio.EndOfChannel:
            return


async def serve_control(stream: Stream, session: HostedSession) -> None:
    """Feed the session from its client's control stream, after `open`, until the stream ends. Raises PeerFault."""
    while True:
        raw = await stream.receive(session.max_body)
        message = parse(raw.header, CONTROL_FROM_CLIENT)
        if isinstance(message, Step):
            if message.seq == REPLAY_SEQ:
                # A replay may be long: it waits in the stream, as on a link.
                await session.wait_for_room()
            session.accept_from_client(message, raw.body)
        elif isinstance(message, Route):
            session.route(message)
        elif isinstance(message, Bridge):
            session.bridge(message)
        elif isinstance(message, Copy):
            session.copy(message)
        elif isinstance(message, Acknowledge):
            session.acknowledge(message.receipt)
        elif isinstance(message, Sampling | Draw):
            session.draw(message, raw.body)
        else:
            raise RemoteProtocolError("a session is opened once")
