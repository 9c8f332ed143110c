"""What a peer is asked to be, in one value, and its rooms, each opened with what it needs of that value."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from peerd.checkpoints import Checkpoints
from peerd.client.audits.policy import AuditPolicy
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.discovery.discovery import Discovery, open_discovery
from peerd.discovery.lan import OpenMulticast, open_lan
from peerd.meters import Meters
from peerd.net.connections import Connections, open_connections
from peerd.net.containment import Containment
from peerd.net.dial_policy import DialPolicy, DialRules
from peerd.net.websockets.transport import WebSocketTransport
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import Identity
from peerd.reach.own_addresses import own_networks
from peerd.reach.reachability import Reachability, open_reach
from peerd.routing.clock import SwarmClock
from peerd.routing.reach.verdict import Whereabouts
from peerd.spans.host import SpanHost
from peerd.trio_tools import Watched, open_tasks

if TYPE_CHECKING:
    from peerd.net.transport import Transport
    from peerd.reach.relay_ledger import RelayLimits
    from peerd.routing.chains.rules import ChainRules
    from peerd.server.server import Server
    from peerd.spans.spec import ServeSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig:
    """The arguments of `open_peer`, which says what each of them means.

    multicast: how peers in the local network find each other; None: not at all.
    """

    identity: Identity = field(default_factory=Identity.generate)
    listen: tuple[Multiaddr, ...] = ()
    announce: tuple[Multiaddr, ...] = ()
    bootstrap: tuple[Multiaddr, ...] = ()
    serve: tuple[ServeSpec, ...] = ()
    state_dir: Path | None = None
    swarm_key: bytes | None = None
    rules: ChainRules | None = None
    audit: AuditPolicy = field(default_factory=AuditPolicy)
    hub: HubSettings = field(default_factory=HubSettings)
    relay: RelayLimits | None = None
    may_be_relayed: bool = True
    may_punch: bool = True
    multicast: OpenMulticast | None = None
    transport: Transport = field(default_factory=WebSocketTransport)
    now: Callable[[], float] = time.time


@asynccontextmanager
async def open_server(
    config: PeerConfig, clock: SwarmClock, containment: Containment, meters: Meters
) -> AsyncIterator[Server | None]:
    if not config.serve:
        yield None
        return
    # Serving needs torch, for which a peer that only keeps the DHT need not wait.
    from peerd.server.server import Server

    server = Server(clock, containment, meters)
    async with open_tasks() as tasks:
        await tasks.start(server.run)
        yield server


@asynccontextmanager
async def open_net(
    config: PeerConfig,
    server: Server | None,
    containment: Containment,
    where: Watched[Whereabouts],
    meters: Meters,
    neighbours: Sequence[Multiaddr],
) -> AsyncIterator[Connections]:
    """neighbours: addresses that were found in the local network, now and later."""
    opening = open_connections(
        config.identity,
        transport=config.transport,
        listen=config.listen,
        handlers=server.handlers if server is not None else {},
        swarm_key=config.swarm_key,
        may_be_relayed=config.may_be_relayed,
        may_punch=config.may_punch,
        dial_rules=dial_rules(config.bootstrap, where, neighbours),
        now=config.now,
        containment=containment,
        meters=meters,
    )
    async with opening as connections:
        yield connections


def dial_rules(
    bootstrap: Sequence[Multiaddr], where: Watched[Whereabouts], neighbours: Sequence[Multiaddr] = ()
) -> DialRules:
    """What we are told in records leads into no network that we do not live in."""

    def ours() -> Sequence[Multiaddr]:
        # Neighbours in our own network meet there, though the swarm is on the internet.
        return (*bootstrap, *where.value.addresses, *own_networks())

    def swarms() -> Sequence[Multiaddr]:
        # Strangers must not aim us at our own network. But if we joined a swarm in a private range, its peers live
        # there. A peer that listens on all addresses listens on loopback too, though its swarm is elsewhere. A peer
        # without bootstrap peers is in the swarm of its neighbours.
        contacts = where.value.contacts
        return (*(bootstrap or neighbours), *([one for one in contacts if not one.is_loopback] or contacts))

    return DialRules(DialPolicy(ours), DialPolicy(swarms), tuple(bootstrap))


def open_own_reach(
    config: PeerConfig, connections: Connections, where: Watched[Whereabouts]
) -> AbstractAsyncContextManager[Reachability]:
    return open_reach(
        connections,
        config.transport,
        announce=config.announce,
        bootstrap=config.bootstrap,
        relay=config.relay,
        swarm_key=config.swarm_key,
        now=config.now,
        where=where,
    )


@asynccontextmanager
async def open_own_discovery(
    config: PeerConfig, connections: Connections, reachability: Reachability, clock: SwarmClock
) -> AsyncIterator[Discovery]:
    opening = open_discovery(
        connections,
        config.identity,
        config.bootstrap,
        state_dir=config.state_dir,
        random=Random(os.urandom(16)),
        clock=clock,
        where=reachability.where,
    )
    async with opening as discovery:
        # Nobody's blocks are nearer than our own.
        discovery.track_record.measured(config.identity.peer_id, 0.0)
        yield discovery


def open_neighbourhood(
    config: PeerConfig,
    connections: Connections,
    discovery: Discovery,
    where: Watched[Whereabouts],
    neighbours: list[Multiaddr],
) -> AbstractAsyncContextManager[None]:
    random = Random(os.urandom(16))
    return open_lan(
        connections,
        discovery,
        where,
        config.multicast,
        neighbours,
        swarm_key=config.swarm_key,
        random=random,
    )


@asynccontextmanager
async def open_spans(
    config: PeerConfig,
    connections: Connections,
    discovery: Discovery,
    reachability: Reachability,
    server: Server | None,
    checkpoints: Checkpoints,
) -> AsyncIterator[SpanHost | None]:
    if server is None:
        yield None
        return
    async with open_tasks() as tasks, AsyncExitStack() as stack:
        if config.may_be_relayed:
            # Only a peer that serves has to be reached.
            random = Random(os.urandom(16))
            await stack.enter_async_context(reachability.holding_reservations(discovery.contacts, random))
        server.attach(connections, discovery.contributions.weight, discovery.receipts.add)
        yield SpanHost(config.identity.peer_id, connections, discovery, server, checkpoints, tasks, config.rules)
