"""A chain whose every hop has granted its part of a session: opened all at once, or closed again.

Knows tickets, epochs and hop numbers; knows no steps. The difficulty is a half-open chain: it holds KV
that others wait for, so the first refusal cancels the other openings and closes what was granted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import trio

from peerd.client_adapters import send_adapter
from peerd.compute.lora import Lora, within
from peerd.connections import Connections
from peerd.control_stream import ControlStream, open_control
from peerd.protocol.adapters import OWN_ADAPTER
from peerd.protocol.errors import PeerdError
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.messages import NextHop, Open, Route
from peerd.protocol.records import SignedRecord
from peerd.protocol.tickets import Ticket, sign_ticket
from peerd.routing.adapters import AdapterNeed
from peerd.routing.chain import Chain, Hop

# A ticket is shown within seconds; the rest allows for clocks that differ.
TICKET_LIFETIME_S = 120


@dataclass(frozen=True, slots=True)
class Terms:
    """What a session asks of every hop."""

    model: bytes
    max_length: int
    max_rows: int
    max_rollback: int
    max_steps: int
    dtype: str
    codec: str
    timeout_ms: int
    # The id of an adapter that every hop has, or the client's own weights, which every hop is sent.
    adapter: str = ""
    own_adapter: Lora | None = None

    @property
    def tokens(self) -> int:
        """KV tokens committed on every hop."""
        return self.max_length * self.max_rows

    @property
    def adapter_need(self) -> AdapterNeed:
        """What a hop must offer for the session's adapter."""
        values: Counter[int] = Counter()
        for (block, _), pair in (self.own_adapter or {}).items():
            values[block] += pair.a.numel() + pair.b.numel()
        return AdapterNeed(self.adapter, values)


class HopRefused(Exception):
    """One hop of a chain could not be opened; `error` says why."""

    def __init__(self, hop: Hop, error: PeerdError) -> None:
        super().__init__(f"{hop.peer_id} for blocks {hop.span}: {error}")
        self.hop = hop
        self.error = error


class OpenChain:
    """The control streams of one session, in the order of the blocks, and the epoch of its route."""

    def __init__(self, session: bytes, controls: list[ControlStream]) -> None:
        self.session = session
        self.controls = controls
        self.epoch = 0
        self.next_number = len(controls)

    def __repr__(self) -> str:
        return f"<OpenChain epoch={self.epoch} {' '.join(str(control.hop.span) for control in self.controls)}>"

    @property
    def max_steps(self) -> int:
        """Unanswered steps that every hop grants."""
        return min(control.opened.max_steps for control in self.controls)

    def describe(self) -> list[dict[str, object]]:
        """Who serves which blocks, as `generate --json` prints it."""
        return [
            {"peer": str(control.hop.peer_id), "start": control.hop.span.start, "end": control.hop.span.end}
            for control in self.controls
        ]

    def replace(self, index: int, control: ControlStream) -> None:
        """Put `control` in the place of hop `index`: a new route, of the next epoch."""
        self.controls[index] = control
        self.epoch += 1
        self.next_number += 1

    def close(self) -> None:
        """End the session on every hop."""
        for control in self.controls:
            control.close()


class PeerRecords(Protocol):
    """Where peers say they are: the directory."""

    async def peer_record(self, peer_id: PeerId) -> SignedRecord | None:
        """The peer's newest record; None if none is found."""


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
    def connections(self) -> Connections:
        """Over which it opens them."""
        return self._connections

    async def open(self, chain: Chain, terms: Terms) -> OpenChain:
        """Open every hop at once. Raises HopRefused for the first that refuses, having closed the others."""
        session = self._random_bytes(16)
        hops = chain.hops
        openings = [
            self._opening(session, hop, terms, 0, index, await self._next(session, hop, after, index + 1, 0))
            for index, (hop, after) in enumerate(zip_longest(hops, hops[1:]))
        ]
        granted: dict[int, ControlStream] = {}
        refusals: list[HopRefused] = []

        async def open_one(index: int, cancel: trio.CancelScope) -> None:
            try:
                granted[index] = await self._open_hop(hops[index], openings[index], terms)
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
        return OpenChain(session, [granted[index] for index in range(len(hops))])

    async def open_replacement(self, chain: OpenChain, index: int, hop: Hop, terms: Terms) -> ControlStream:
        """Open `hop` in the place of the chain's hop `index`, one epoch later. Raises HopRefused."""
        epoch = chain.epoch + 1
        next_hop = None
        if index + 1 < len(chain.controls):
            after = chain.controls[index + 1]
            next_hop = await self._next(chain.session, hop, after.hop, after.number, epoch)
        opening = self._opening(chain.session, hop, terms, epoch, chain.next_number, next_hop)
        try:
            return await self._open_hop(hop, opening, terms)
        except PeerdError as error:
            raise HopRefused(hop, error) from error

    async def _open_hop(self, hop: Hop, opening: Open, terms: Terms) -> ControlStream:
        """Open one hop, and have it ready for steps. Raises what it refuses with, or a PeerFault."""
        control = await open_control(self._connections, hop, opening)
        if OWN_ADAPTER not in opening.needs:
            return control
        assert terms.own_adapter is not None
        try:
            await send_adapter(self._connections, hop, opening.session, opening.hop, terms.own_adapter)
        except BaseException:
            control.close()
            raise
        return control

    async def route(self, chain: OpenChain, upstream: ControlStream, to: ControlStream) -> Route:
        """What tells `upstream` to push to `to` from the chain's epoch on."""
        next_hop = await self._next(chain.session, upstream.hop, to.hop, to.number, chain.epoch)
        return Route(epoch=chain.epoch, next=next_hop)

    def _opening(
        self, session: bytes, hop: Hop, terms: Terms, epoch: int, number: int, next_hop: NextHop | None
    ) -> Open:
        return Open(
            session=session,
            hop=number,
            epoch=epoch,
            model=terms.model,
            start=hop.span.start,
            end=hop.span.end,
            max_length=terms.max_length,
            max_rows=terms.max_rows,
            max_rollback=terms.max_rollback,
            max_steps=terms.max_steps,
            dtype=terms.dtype,
            codec=terms.codec,
            timeout_ms=terms.timeout_ms,
            adapter=terms.adapter,
            needs=(OWN_ADAPTER,) if within(terms.own_adapter or {}, hop.span) else (),
            next=next_hop,
        )

    async def _next(self, session: bytes, sender: Hop, receiver: Hop | None, number: int, epoch: int) -> NextHop | None:
        """Leave for `sender` to push this session's results to `receiver`, which knows itself as hop `number`."""
        if receiver is None:
            return None
        # Where the receiver is now: what its offer came with may have expired in a long session.
        record = await self._directory.peer_record(receiver.peer_id) or receiver.offer.peer_record
        ticket = Ticket(
            session=session,
            hop=number,
            epoch=epoch,
            sender=sender.peer_id,
            receiver=receiver.peer_id,
            expires=math.ceil(self._now() + TICKET_LIFETIME_S),
        )
        return NextHop(sign_ticket(self._identity, ticket), record.encode())
