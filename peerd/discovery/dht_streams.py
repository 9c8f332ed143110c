"""Carries the DHT's questions and answers over streams, one question a stream (spec/discovery/dht.md).

What the messages mean is decided in `routing/dht`. The answers come from strangers: an address that a peer gives for
another peer may lie in our own network, so it is checked before it is dialled, and bodies are bounded.
"""

from __future__ import annotations

import trio

from peerd.discovery.question_rates import QuestionRates
from peerd.net.connections import Connections, Stream
from peerd.net.limits.owners import Owner, network_of
from peerd.protocol.connection.frames import Priority
from peerd.protocol.errors import InvalidRequest, Overloaded, RemoteProtocolError, StreamReset, UnsupportedFeature
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.session import Failure
from peerd.protocol.records.envelope import MAX_RECORD_BYTES
from peerd.routing.dht.dht import Dht
from peerd.routing.dht.messages import DHT_PROTOCOL, MAX_RECORDS, Packet, pack_records, unpack_records
from peerd.routing.dht.rpc import Sighting
from peerd.routing.dht.table import Contact

# A set of records, each with its length in front.
MAX_BODY_BYTES = MAX_RECORDS * (MAX_RECORD_BYTES + 2)
# A set of records may be as large as a prefill. Above this size it is sent with a prefill's priority, behind the steps
# of sessions.
SMALL_BODY_BYTES = 4096
# From the question's first byte to the answer's last. The asking peer gives up after 3 s.
ANSWER_DEADLINE_S = 10.0


class StreamTransport:
    """Carries each question on a stream of its own: its cancelling is a reset, and no answer waits for another."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def request(self, contact: Contact, packet: Packet) -> Packet:
        """Ask the peer. Raises the error that the peer answers with, or a PeerFault."""
        stream = await self._connections.open_stream(
            contact.peer_id,
            DHT_PROTOCOL,
            addresses=contact.addresses,
            policy=self._connections.strangers_policy,
        )
        async with stream:
            await _send(stream, packet)
            stream.finish()
            try:
                answer = await stream.receive(max_body=MAX_BODY_BYTES)
            except trio.EndOfChannel:
                raise RemoteProtocolError(f"{contact.peer_id} finished without an answer") from None
            except StreamReset as reset:
                raise reset.refusal from None
        if answer.header.get("type") == Failure.TYPE:
            raise Failure.from_header(answer.header).error
        return Packet(answer.header, unpack_records(answer.body))

    def sighting(self, peer_id: PeerId) -> Sighting:
        """The addresses at which we found the peer, and the network in which it is seen now."""
        sightings, connection = self._connections.sightings, self._connections.live.get(peer_id)
        network = network_of(connection.accountable_ip) if connection is not None else ""
        return Sighting(sightings.addresses_of(peer_id), network or sightings.network_of(peer_id))

    def is_near(self, peer_id: PeerId) -> bool:
        """Whether we see the peer at no public address."""
        connection = self._connections.live.get(peer_id)
        return connection is None or not network_of(connection.accountable_ip)

    async def find(self, contact: Contact) -> None:
        """Look for the peer at those of its addresses at which it was not found yet."""
        connections = self._connections
        found = connections.sightings.addresses_of(contact.peer_id)
        async with trio.open_nursery() as nursery:
            for address in contact.addresses:
                if address not in found:
                    nursery.start_soon(connections.find, contact.peer_id, address, connections.strangers_policy)


async def answer_question(dht: Dht, rates: QuestionRates, stream: Stream) -> None:
    """Answer the question that opens a stream of the DHT's protocol, and end the stream.

    A peer that asks too often is refused with `overloaded`, before its question is read.

    A DHT client resets the stream instead. A peer that asks one has an old entry of it in its routing table; the
    refusal makes it drop that entry.
    """
    if not dht.addresses:
        stream.reset(UnsupportedFeature.code)
        return
    owner = Owner.at(stream.peer, stream.connection.accountable_ip)
    if not rates.may_ask(owner, trio.current_time()):
        stream.reset(Overloaded.code)
        return
    with trio.move_on_after(ANSWER_DEADLINE_S):
        async with stream:
            question = await stream.receive(max_body=MAX_BODY_BYTES)
            packet = Packet(question.header, unpack_records(question.body))
            try:
                if not rates.may_store(owner, len(packet.records), trio.current_time()):
                    raise Overloaded("you, or your network, store too many records")
                answer = await dht.handle(stream.peer, packet, stream.connection.accountable_ip)
            except (InvalidRequest, Overloaded) as error:
                answer = Packet(Failure.of(error).to_header())
            await _send(stream, answer)
            stream.finish()
            await stream.wait_drained()


async def _send(stream: Stream, packet: Packet) -> None:
    body = pack_records(packet.records)
    priority = Priority.CONTROL if len(body) <= SMALL_BODY_BYTES else Priority.PREFILL
    await stream.send(packet.header, [body], priority=priority)
