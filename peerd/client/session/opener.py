"""Opens hops of a session, either all or none, and asks open hops for their progress.

A half-open chain holds KV memory for which other sessions wait. So the first refusal cancels the other openings and
closes the hops that were granted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import trio

from peerd.client.finding.voice import voice_of
from peerd.client.session.hops.control_stream import ControlStream, open_control
from peerd.client.session.live_chain import LiveChain
from peerd.compute.adapters.lora import Lora, within
from peerd.exchange.adapter_upload import needs_of, send_adapter
from peerd.net.connections import Connections
from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.schema import parse
from peerd.protocol.errors import ConnectionLost, PeerdError
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.messages.adapters import OWN_ADAPTER
from peerd.protocol.messages.audits import SEED_BYTES, Copy
from peerd.protocol.messages.drawing import HEAD
from peerd.protocol.messages.session import (
    PROGRESS_FROM_HOP,
    PROGRESS_PROTOCOL,
    Ask,
    Failure,
    NextHop,
    OpenSession,
    Progress,
    Route,
)
from peerd.protocol.messages.tickets import Ticket, sign_ticket
from peerd.protocol.records.envelope import SignedRecord
from peerd.protocol.rows import SessionSize
from peerd.routing.chains.adapter_choice import AdapterNeed
from peerd.routing.chains.chain import Hop

# A ticket is used within seconds; the rest allows for clocks that differ.
TICKET_LIFETIME_S = 120
# In mid-answer a lookup of a newer address must not take longer: it may be waiting for the peer that has just died.
RECORD_PATIENCE_S = 0.5


@dataclass(frozen=True, slots=True)
class Terms:
    """What a session asks of every hop."""

    model: bytes
    size: SessionSize
    max_steps: int
    dtype: str
    codec: str
    timeout_ms: int
    # The id of an adapter that every hop has; or the client's own weights, which are sent to every hop.
    adapter: str = ""
    own_adapter: Lora | None = None
    # Features that every hop must have.
    needs: tuple[str, ...] = ()
    # Whether hops are asked for sketches of what comes to them; those that know nothing of it send none.
    are_sketched: bool = False
    # Whether the last hop draws tokens, where it offers that.
    head: bool = False

    @property
    def tokens(self) -> int:
        """KV tokens committed on every hop."""
        return self.size.positions

    @property
    def adapter_need(self) -> AdapterNeed:
        """What a hop must offer for the session's adapter."""
        values: Counter[int] = Counter()
        for (block, _), weights in (self.own_adapter or {}).items():
            values[block] += weights.n_values
        return AdapterNeed(self.adapter, values)


class HopRefused(Exception):
    """One hop of a chain could not be opened; `error` is the reason."""

    def __init__(self, hop: Hop, error: PeerdError) -> None:
        super().__init__(f"{hop.peer_id} for blocks {hop.span}: {error}")
        self.hop = hop
        self.error = error


class PeerRecords(Protocol):
    """Where peers can be dialled, by their own records: the directory."""

    async def peer_record(self, peer_id: PeerId) -> SignedRecord | None:
        """The peer's newest record, or None."""


class ChainOpener:
    """Opens sessions along chains, in the name of one identity."""

    def __init__(
        self,
        connections: Connections,
        identity: Identity,
        directory: PeerRecords,
        now: Callable[[], float],
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._connections = connections
        self._identity = identity
        self._directory = directory
        self._now = now
        self._random_bytes = random_bytes

    @property
    def identity(self) -> Identity:
        """The client's identity."""
        return self._identity

    @property
    def connections(self) -> Connections:
        """The connections over which hops are opened."""
        return self._connections

    async def open(
        self, chain: LiveChain, epoch: int, hops: Sequence[Hop], terms: Terms, margin_s: float
    ) -> list[ControlStream]:
        """Open hops with consecutive blocks for `chain`, all at the same time. The last one pushes to the hop that
        follows.

        margin_s: the time for dialling. If hops refuse, closes the others and raises HopRefused for the first.
        """
        numbers = chain.take_numbers(len(hops))
        after = chain.after(hops[-1].span.end)
        followers = [*zip(hops[1:], numbers[1:], strict=True), (after.hop, after.number) if after is not None else None]
        granted: dict[int, ControlStream] = {}
        refusals: list[HopRefused] = []

        async def open_one(index: int, cancel: trio.CancelScope) -> None:
            hop, follower = hops[index], followers[index]
            next_hop = None if follower is None else await self._next(chain.session, hop, *follower, epoch)
            opening = self._opening(chain.session, hop, terms, epoch, numbers[index], next_hop)
            try:
                granted[index] = await self._open_hop(hop, opening, terms, margin_s)
            except PeerdError as error:
                refusals.append(HopRefused(hops[index], error))
                cancel.cancel()

        try:
            async with trio.open_nursery() as nursery:
                for index in range(len(hops)):
                    nursery.start_soon(open_one, index, nursery.cancel_scope)
        finally:
            if len(granted) < len(hops):
                for control in granted.values():
                    control.close()
        if refusals:
            raise refusals[0]
        return [granted[index] for index in range(len(hops))]

    async def _open_hop(self, hop: Hop, opening: OpenSession, terms: Terms, margin_s: float) -> ControlStream:
        """Open one hop and make it ready for steps. Raises the error with which it refuses, or a PeerFault."""
        control = await open_control(self._connections, hop, opening, margin_s)
        if OWN_ADAPTER not in opening.needs:
            return control
        assert terms.own_adapter is not None
        try:
            await send_adapter(self._connections, hop, opening.session, opening.hop, terms.own_adapter)
        except BaseException:
            control.close()
            raise
        return control

    async def route(self, session: bytes, epoch: int, upstream: ControlStream, to: ControlStream) -> Route:
        """The message that tells `upstream` to push to `to` from this epoch on."""
        next_hop = await self._next(session, upstream.hop, to.hop, to.number, epoch)
        return Route(epoch=epoch, next=next_hop)

    async def ask(self, chain: LiveChain, control: ControlStream) -> Progress:
        """Ask a hop how far it is with the session. Sets no deadline. Raises a PeerFault, or the hop's own error."""
        stream = await self._connections.open_stream(control.hop.peer_id, PROGRESS_PROTOCOL, priority=Priority.CONTROL)
        async with stream:
            await stream.send(Ask(session=chain.session, hop=control.number).to_header())
            try:
                reply = parse((await stream.receive()).header, PROGRESS_FROM_HOP)
            except trio.EndOfChannel:
                raise ConnectionLost(f"{control.hop.peer_id} ended the stream") from None
        if isinstance(reply, Failure):
            raise reply.error
        assert isinstance(reply, Progress)
        return reply

    async def open_beside(
        self, chain: LiveChain, hop: Hop, terms: Terms, seeds: tuple[bytes, ...], margin_s: float
    ) -> ControlStream:
        """Open one more hop for the chain's session that is no part of the chain. It has no next hop. Raises the error
        with which it refuses, or a PeerFault.
        """
        (number,) = chain.take_numbers(1)
        opening = self._opening(chain.session, hop, terms, chain.epoch, number, None)
        return await open_control(self._connections, hop, replace(opening, sketch=seeds), margin_s)

    async def copy(self, chain: LiveChain, upstream: ControlStream, to: ControlStream) -> None:
        """Have a hop of the chain send its rows to one beside it. Raises a PeerFault, trio.ClosedResourceError."""
        next_hop = await self._next(chain.session, upstream.hop, to.hop, to.number, chain.epoch)
        upstream.send_nowait(Copy(epoch=chain.epoch, next=next_hop), priority=Priority.CONTROL)

    def new_seed(self) -> bytes:
        """A seed for sketches that others cannot guess."""
        return self._random_bytes(SEED_BYTES)

    def voice(self, peer_id: PeerId) -> str:
        """Who counts as one with a peer: its public network, where a connection shows it, or itself alone."""
        return voice_of(self._connections, peer_id)

    def new_session(self) -> bytes:
        """An id for a session that others cannot guess."""
        return self._random_bytes(16)

    def _opening(
        self, session: bytes, hop: Hop, terms: Terms, epoch: int, number: int, next_hop: NextHop | None
    ) -> OpenSession:
        draws = terms.head and next_hop is None and hop.offer.record.head
        return OpenSession(
            session=session,
            hop=number,
            epoch=epoch,
            model=terms.model,
            start=hop.span.start,
            end=hop.span.end,
            max_length=terms.size.max_length,
            max_rows=terms.size.max_rows,
            max_rollback=terms.size.max_rollback,
            prompt_length=terms.size.prompt_length,
            max_steps=terms.max_steps,
            dtype=terms.dtype,
            codec=terms.codec,
            timeout_ms=terms.timeout_ms,
            adapter=terms.adapter,
            needs=terms.needs + needs_of(within(terms.own_adapter or {}, hop.span)) + (HEAD,) * draws,
            next=next_hop,
            sketch=(self.new_seed(),) if terms.are_sketched else (),
        )

    async def _next(self, session: bytes, sender: Hop, receiver: Hop, number: int, epoch: int) -> NextHop:
        """Permission for `sender` to push this session's results to `receiver`, under the receiver's hop number
        `number`.
        """
        # Look up the receiver's current addresses: in a long session those of its offer may have expired.
        record = receiver.offer.peer_record
        with trio.move_on_after(RECORD_PATIENCE_S):
            record = await self._directory.peer_record(receiver.peer_id) or record
        ticket = Ticket(
            session=session,
            hop=number,
            epoch=epoch,
            sender=sender.peer_id,
            receiver=receiver.peer_id,
            expires=math.ceil(self._now() + TICKET_LIFETIME_S),
        )
        return NextHop(sign_ticket(self._identity, ticket), record.encode())
