"""Finds peers in the local network by multicast DNS, and lets them find us (spec/discovery/lan.md).

It announces the addresses that the DHT has of us, as far as they are the network's own, and nothing of what we serve.
In a private swarm an announcement holds neither a PeerId nor anything by which two of them could be connected: a tag
that only members can compute says to which swarm it belongs. What others announce is a hint; the handshake proves it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from random import Random
from typing import Protocol

import trio

from peerd.discovery.discovery import Discovery
from peerd.net.connections import Connections
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import InvalidRequest, PeerFault
from peerd.protocol.identity import PeerId, public_key_of
from peerd.routing.dht.table import Contact
from peerd.routing.reach.verdict import Whereabouts
from peerd.trio_tools import Watched, open_tasks

log = logging.getLogger(__name__)

SERVICE = "_peerd._tcp.local."
VERSION = "1"
TAG_BYTES = 16
# A neighbour that did not answer is asked again no sooner than this.
RETRY_S = 60.0
# Anybody in the network can announce any number.
MAX_NEIGHBOURS = 64
MAX_HOSTS = 8
# To find out who a neighbour is, and to ask it. Neighbours are near; several of them are met at a time.
MEET_S = 10.0
MEETINGS_AT_ONCE = 8
# Between two announcements of changed addresses, which may change several times at the start.
_SETTLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Sighting:
    """A peer's announcement: the label that it chose, where it listens, and its words."""

    label: str
    hosts: tuple[str, ...]
    port: int
    words: Mapping[str, str] = field(default_factory=dict)


class Multicast(Protocol):
    """Multicast DNS for our service. `sightings`: what others announce, and changes of it."""

    sightings: trio.MemoryReceiveChannel[Sighting]

    async def announce(self, sighting: Sighting | None) -> None:
        """Announce this instead of what was announced before; None for nothing."""


OpenMulticast = Callable[[], AbstractAsyncContextManager[Multicast]]


def tag_of(swarm_key: bytes, label: str) -> str:
    """What a member of a private swarm says in an announcement with this label: 16 bytes, in base64url."""
    mac = hmac.new(swarm_key, b"peerd lan 1\n" + label.encode(), hashlib.sha256).digest()
    return urlsafe_b64encode(mac[:TAG_BYTES]).rstrip(b"=").decode()


class Neighbourhood:
    """This peer's part in the local network. Made by `open_lan`."""

    def __init__(
        self,
        connections: Connections,
        discovery: Discovery,
        swarm_key: bytes | None,
        label: str,
        multicast: Multicast,
        neighbours: list[Multiaddr],
    ) -> None:
        self._connections = connections
        self._discovery = discovery
        self._swarm_key = swarm_key
        self._label = label
        self._multicast = multicast
        self._neighbours = neighbours
        self._tried: dict[str, float] = {}
        self._places = trio.Semaphore(MEETINGS_AT_ONCE)

    def sighting(self, where: Whereabouts) -> Sighting | None:
        """What to announce while others reach us there; None if nobody in the network could."""
        ours = [one for one in (*where.contacts, *where.addresses) if one.is_private and not one.is_loopback]
        ours = [one for one in ours if one.ip is not None and not one.secure and one.relay is None]
        if not ours:
            return None
        hosts = dict.fromkeys(one.host for one in ours if one.port == ours[0].port)
        return Sighting(self._label, tuple(hosts)[:MAX_HOSTS], ours[0].port, self._words())

    def _words(self) -> dict[str, str]:
        if self._swarm_key is None:
            return {"v": VERSION, "peer": str(self._connections.peer_id)}
        return {"v": VERSION, "tag": tag_of(self._swarm_key, self._label)}

    async def announce(self, where: Watched[Whereabouts]) -> None:
        """Announce where we are, now and after each change, until cancelled."""
        changed = trio.Event()

        def note(_where: Whereabouts) -> None:
            changed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(where.follow, note)
            while True:
                await changed.wait()
                await trio.sleep(_SETTLE_S)
                changed = trio.Event()
                await self._multicast.announce(self.sighting(where.value))

    async def meet(self) -> None:
        """Get to know the peers of our swarm that announce themselves, until cancelled."""
        contained = self._connections.containment.contained
        async with trio.open_nursery() as nursery:
            async for sighting in self._multicast.sightings:
                # Only those that could be ours are remembered: many peers of other swarms may be in the same network.
                if self._is_of_ours(sighting) and self._is_new(sighting):
                    nursery.start_soon(partial(contained, self._meet_in_turn, sighting, what="meeting a neighbour"))

    async def _meet_in_turn(self, sighting: Sighting) -> None:
        """As `_meet`, a few at a time, and not for long: anybody in the network can announce places where nobody
        answers.
        """
        async with self._places:
            with trio.move_on_after(MEET_S):
                await self._meet(sighting)

    def _is_new(self, sighting: Sighting) -> bool:
        now = trio.current_time()
        if sighting.label == self._label or now - self._tried.get(sighting.label, -RETRY_S) < RETRY_S:
            return False
        if len(self._tried) >= MAX_NEIGHBOURS:
            self._tried = {label: at for label, at in self._tried.items() if now - at < RETRY_S}
            if len(self._tried) >= MAX_NEIGHBOURS:
                return False
        self._tried[sighting.label] = now
        return True

    def _is_of_ours(self, sighting: Sighting) -> bool:
        if sighting.words.get("v") != VERSION:
            return False
        if self._swarm_key is None:
            return "peer" in sighting.words
        tag = sighting.words.get("tag", "")
        return hmac.compare_digest(tag.encode(), tag_of(self._swarm_key, sighting.label).encode())

    async def _meet(self, sighting: Sighting) -> None:
        addresses = self._connections.own_policy.of(addresses_of(sighting))
        if not addresses:
            return
        try:
            peer_id = await self._who_is(sighting, addresses)
        except (PeerFault, InvalidRequest, ValueError) as error:
            log.debug("a neighbour in this network cannot be reached: %s", error)
            return
        known = peer_id in {contact.peer_id for contact in self._discovery.contacts()}
        if known:
            return
        # Only then may we dial what the DHT says of this network, and this peer itself.
        new = [address for address in addresses if address not in self._neighbours]
        self._neighbours += new
        is_there = False
        try:
            is_there = await self._discovery.meet(Contact(peer_id, addresses))
        finally:
            if not is_there:
                # Nobody has proved that the swarm is in this network.
                for address in new:
                    with suppress(ValueError):
                        self._neighbours.remove(address)
        if is_there:
            log.info("found %s in this network", peer_id)
            del self._neighbours[:-MAX_NEIGHBOURS]

    async def _who_is(self, sighting: Sighting, addresses: Sequence[Multiaddr]) -> PeerId:
        """The PeerId; in a private swarm only the handshake tells it. Raises PeerFault, InvalidRequest, ValueError."""
        if self._swarm_key is None:
            public_key_of(PeerId(sighting.words["peer"]))
            return PeerId(sighting.words["peer"])
        return (await self._connections.connect(None, addresses)).peer_id


def addresses_of(sighting: Sighting) -> tuple[Multiaddr, ...]:
    """The addresses in a sighting that belong to a local network, without duplicates."""
    found = []
    for host in sighting.hosts[:MAX_HOSTS]:
        try:
            ip = ip_address(host)
            address = Multiaddr("ip4" if ip.version == 4 else "ip6", str(ip), sighting.port)
        except ValueError:
            continue
        if address.is_private and not address.is_loopback and address.is_dialable:
            found.append(address)
    return tuple(dict.fromkeys(found))


@asynccontextmanager
async def open_lan(
    connections: Connections,
    discovery: Discovery,
    where: Watched[Whereabouts],
    open_multicast: OpenMulticast | None,
    neighbours: list[Multiaddr],
    *,
    swarm_key: bytes | None,
    random: Random,
) -> AsyncIterator[None]:
    """Find neighbours until the block ends, and add their addresses to `neighbours`.

    open_multicast: None finds none, and lets nobody find us.
    """
    if open_multicast is None:
        yield
        return
    # Another one after each start, so that nobody can follow a private peer by it.
    label = f"{random.getrandbits(64):016x}"
    async with open_multicast() as multicast, open_tasks() as tasks:
        neighbourhood = Neighbourhood(connections, discovery, swarm_key, label, multicast, neighbours)
        keep = connections.containment.keep_running
        tasks.start_soon(partial(keep, neighbourhood.announce, where, what="announcing in this network"))
        tasks.start_soon(partial(keep, neighbourhood.meet, what="looking for peers in this network"))
        yield
