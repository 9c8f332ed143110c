"""One peer's end of the DHT: asks other peers and answers them, and learns from both which peers are alive.

Implements kademlia's protocol over a transport that proves the PeerId of the other end. The table holds peers that
were found at their addresses; a peer that fails leaves it at once, and one without addresses never enters it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from random import Random
from typing import Protocol, TypeVar

import trio
from kademlia.node import Node
from kademlia.protocol import KademliaProtocol

from peerd.protocol.addresses import Multiaddr, public_network
from peerd.protocol.encoding.schema import Message, parse
from peerd.protocol.errors import CallerError, InvalidRequest, LinkFailed, Overloaded, PeerFault, RemoteProtocolError
from peerd.protocol.identity import PeerId
from peerd.routing.dht.lost_contacts import LostContacts
from peerd.routing.dht.messages import (
    MAX_CONTACTS,
    MAX_STORED_AT_ONCE,
    QUESTIONS,
    FindNode,
    FindValue,
    Found,
    Outcome,
    Packet,
    Ping,
    Pong,
    Question,
    Store,
    Stored,
)
from peerd.routing.dht.newcomers import Newcomers
from peerd.routing.dht.set_reading import answer_of, digests_of
from peerd.routing.dht.store import RecordStore
from peerd.routing.dht.table import Bucket, Contact, ContactTable, PeerNode

# A dial takes four round trips and a busy peer may take a second; more would only delay giving up.
REQUEST_TIMEOUT_S = 3.0


class DhtTransport(Protocol):
    """Carries a question to a peer whose identity the connection proves, and returns its answer.

    Raises PeerFault (ConnectFailed, ConnectionLost, ...) if the peer failed, or the error with which it answered.
    Sets no deadline: the caller cancels.
    """

    async def request(self, contact: Contact, packet: Packet) -> Packet: ...

    def sighting(self, peer_id: PeerId) -> Sighting:
        """The addresses at which the peer was found lately."""

    async def find(self, contact: Contact) -> None:
        """Look for the peer at its addresses, in a bounded time; `sighting` then returns what was found. Never
        raises.
        """

    def is_near(self, peer_id: PeerId) -> bool:
        """Whether the peer is in a network like ours, so that it may name addresses there; False for one on the public
        internet, which would aim us at ourselves.
        """


@dataclass(frozen=True, slots=True)
class Sighting:
    """The addresses at which a dialled peer proved its identity, and its public network, or ""."""

    addresses: frozenset[Multiaddr] = frozenset()
    network: str = ""


@dataclass(frozen=True, slots=True)
class FindReply:
    """One peer's answer in a lookup."""

    nodes: list[PeerNode]
    records: tuple[bytes, ...]
    split: bool
    digests: tuple[bytes, ...] = ()


M = TypeVar("M", bound=Message)


class DhtProtocol(KademliaProtocol):  # type: ignore[misc]  # kademlia publishes no types
    """kademlia's `call_*` (our questions) and `rpc_*` (our answers), on typed messages.

    addresses: where we can be dialled, sent along with each question; () makes us a DHT client.
    lost: takes the peers that left the table because they did not answer.
    """

    def __init__(
        self, own: PeerNode, store: RecordStore, transport: DhtTransport, random: Random, lost: LostContacts
    ) -> None:
        super().__init__(own, store, MAX_CONTACTS)
        self.source_node: PeerNode = own
        self.storage: RecordStore = store
        self.router = ContactTable(own, MAX_CONTACTS, trio.current_time, lost.add)
        self.addresses: tuple[Multiaddr, ...] = own.contact.addresses
        self._transport = transport
        self._random = random
        #: Peers that named addresses at which they were not found yet.
        self.newcomers = Newcomers()

    def __getattr__(self, name: str) -> object:
        # The library turns every unknown attribute, and so every misspelling, into a remote call.
        raise AttributeError(f"{type(self).__name__} has no {name}")

    # Questions. None stands for "no answer", whatever the reason.

    async def call_ping(self, node_to_ask: PeerNode) -> bool:
        return await self._ask(node_to_ask, Ping(self.addresses), Pong) is not None

    async def call_find_node(self, node_to_ask: PeerNode, node_to_find: Node) -> FindReply | None:
        question = FindNode(node_to_find.id, self.addresses)
        return self._find_reply(node_to_ask, await self._ask(node_to_ask, question, Found))

    async def call_find_value(
        self, node_to_ask: PeerNode, node_to_find: Node, salt: bytes = b"", only: Sequence[bytes] = ()
    ) -> FindReply | None:
        question = FindValue(node_to_find.id, self.addresses, salt, tuple(only))
        return self._find_reply(node_to_ask, await self._ask(node_to_ask, question, Found))

    def _find_reply(self, asked: PeerNode, answer: tuple[Found, tuple[bytes, ...]] | None) -> FindReply | None:
        if answer is None:
            return None
        found, records = answer
        nodes = list(found.nodes)
        if not self._transport.is_near(asked.contact.peer_id):
            nodes = [_without_private(node) for node in nodes]
        return FindReply(nodes, records, found.split, found.digests)

    async def call_store(self, node_to_ask: PeerNode, key: bytes, records: Sequence[bytes]) -> tuple[Outcome, ...]:
        """The outcome of each record; () if the peer did not give one for each."""
        answer = await self._ask(node_to_ask, Store(key, self.addresses), Stored, records)
        if answer is None or len(answer[0].outcomes) != len(records):
            return ()
        return answer[0].outcomes

    async def _ask(
        self, node: PeerNode, question: Question, expected: type[M], records: Sequence[bytes] = ()
    ) -> tuple[M, tuple[bytes, ...]] | None:
        try:
            with trio.fail_after(REQUEST_TIMEOUT_S):
                packet = await self._transport.request(node.contact, Packet(question.to_header(), tuple(records)))
            answer = parse(packet.header, (expected,))
        except (PeerFault, trio.TooSlowError):
            self.router.remove_contact(node)
            return None
        except (Overloaded, CallerError, LinkFailed):
            # The peer is alive but does not answer this. It can tell us no other errors (`from_wire`).
            return None
        # The peer counts in the network where it is, whatever others said.
        node.network = self._transport.sighting(node.contact.peer_id).network
        # The addresses that the peer itself named are worth more than those from other peers.
        self.welcome_if_new(self.router.get(node.id) or node)
        return answer, packet.records

    def welcome_if_new(self, node: PeerNode) -> None:
        """Note that the peer is alive. It enters the table with the addresses at which it was found. If there are
        others, it waits until we have looked for it there.

        The library would also send a new peer every record that it should now hold. Ours are put anew within a third of
        their short lives, so a newcomer has them soon, and no peer can make us send them in bulk.
        """
        if node.id == self.source_node.id:
            return
        if not node.contact.addresses:
            self.router.remove_contact(node)
            return
        seen = self._transport.sighting(node.contact.peer_id)
        found = tuple(address for address in node.contact.addresses if address in seen.addresses)
        if found:
            self.router.add_contact(PeerNode(Contact(node.contact.peer_id, found), seen.network))
        if len(found) < len(node.contact.addresses):
            self.newcomers.add(node)

    async def meet(self, node: PeerNode) -> None:
        """Look for a newcomer at the addresses that it named. If it is found, it enters the table."""
        await self._transport.find(node.contact)
        seen = self._transport.sighting(node.contact.peer_id)
        found = tuple(address for address in node.contact.addresses if address in seen.addresses)
        if found:
            self.router.add_contact(PeerNode(Contact(node.contact.peer_id, found), seen.network))

    def get_refresh_ids(self, buckets: Sequence[Bucket] | None = None) -> list[bytes]:
        """A random id to look up in each of the buckets; by default in those that were idle for long."""
        chosen = self.router.lonely_buckets() if buckets is None else buckets
        # The library draws from the global random generator instead.
        return [self._random.randrange(bucket.range[0], bucket.range[1]).to_bytes(20, "big") for bucket in chosen]

    # Answers.

    def answer(self, sender: PeerId, packet: Packet, source: IPv4Address | IPv6Address | None) -> Packet:
        """Answer a question of the peer `sender`, whose PeerId its connection proved.

        source: the address at which we see it. Raises InvalidRequest.
        """
        try:
            question: Question = parse(packet.header, QUESTIONS)
        except RemoteProtocolError as error:
            raise InvalidRequest(str(error)) from None
        node = PeerNode(Contact(sender, nameable(question.addresses, source)))
        self.welcome_if_new(node)
        match question:
            case Ping():
                return Packet(self.rpc_ping().to_header())
            case FindNode(key):
                return Packet(self.rpc_find_node(node, key).to_header())
            case FindValue():
                found, records = self.rpc_find_value(node, question)
                return Packet(found.to_header(), records)
            case Store(key):
                return Packet(self.rpc_store(node, key, packet.records, source).to_header())

    def rpc_ping(self) -> Pong:
        return Pong()

    def rpc_find_node(self, sender: PeerNode, key: bytes) -> Found:
        return Found(tuple(self._neighbors(sender, key)))

    def rpc_find_value(self, sender: PeerNode, question: FindValue) -> tuple[Found, tuple[bytes, ...]]:
        held = self.storage.get_encoded(question.key)
        records, by_digest = answer_of(held, question.salt, question.only)
        digests = digests_of(question.salt, held) if by_digest else ()
        # Contacts go along with records: a lookup does not stop at the first peer that has some.
        nodes = tuple(self._neighbors(sender, question.key))
        return Found(nodes, self.storage.is_split(question.key), digests), records

    def rpc_store(
        self, sender: PeerNode, key: bytes, records: Sequence[bytes], source: IPv4Address | IPv6Address | None
    ) -> Stored:
        if not 0 < len(records) <= MAX_STORED_AT_ONCE:
            raise InvalidRequest(f"store: takes 1 to {MAX_STORED_AT_ONCE} records, not {len(records)}")
        storer = sender.contact.peer_id
        return Stored(tuple(self.storage.put(key, record, storer=storer, source=source) for record in records))

    def _neighbors(self, sender: PeerNode, key: bytes) -> list[PeerNode]:
        return self.router.find_neighbors(Node(key), exclude=sender)


def nameable(addresses: tuple[Multiaddr, ...], source: IPv4Address | IPv6Address | None) -> tuple[Multiaddr, ...]:
    """The addresses that a peer which we see at `source` may name as its own: none in private networks if it is on the
    public internet, for strangers would aim us there.
    """
    return addresses if public_network(source) is None else tuple(one for one in addresses if not one.is_private)


def _without_private(node: PeerNode) -> PeerNode:
    contact = node.contact
    if not any(address.is_private for address in contact.addresses):
        return node
    return PeerNode(Contact(contact.peer_id, tuple(one for one in contact.addresses if not one.is_private)))
