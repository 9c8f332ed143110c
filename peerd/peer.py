"""A peer: its identity, its connections, the spans that it serves and the models that it uses, under one owner.

`open_peer` connects the rooms and owns the nursery in which every task of a peer runs. The order of endings matters:
announcements are withdrawn while connections are still open, connections close before the sessions whose streams they
carry, and a caller's exception leaves as it came in.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import trio

from peerd.checkpoints import Checkpoints, fetch_head
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.discovery.discovery import Discovery, open_discovery
from peerd.discovery.kept_clock import is_clock_kept
from peerd.discovery.prober import Prober
from peerd.net.connections import Connections, open_connections
from peerd.net.containment import Containment
from peerd.net.dial_policy import DialPolicy
from peerd.net.websocket import WebSocketTransport
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.messages.dialback import DIALBACK_PROTOCOL
from peerd.protocol.messages.relay import RELAY_PROTOCOL, RELAY_ROLE
from peerd.reach.checker import Reachability
from peerd.reach.dialback import DialbackAnswerer
from peerd.reach.own_addresses import dialable_forms, own_networks
from peerd.reach.relay import Relay
from peerd.reach.reservations import Reservations, open_reservations
from peerd.routing.chains.rules import ChainRules
from peerd.routing.clock import SwarmClock
from peerd.routing.reach.verdict import Announced, Reach
from peerd.spans.host import SpanHost
from peerd.trio_tools import import_in_thread, open_tasks

if TYPE_CHECKING:
    from peerd.client.blocks import ServedBlocks
    from peerd.client.model import SwarmModel
    from peerd.compute.checkpoint.checkpoint import Checkpoint
    from peerd.net.transport import Transport
    from peerd.reach.relay_ledger import RelayLimits
    from peerd.server.served_spans import ServedSpan
    from peerd.server.server import Server
    from peerd.spans.spec import ServeSpec

log = logging.getLogger(__name__)

Address = Multiaddr | str
# Every interface, any free port.
DEFAULT_LISTEN = Multiaddr.parse("/ip4/0.0.0.0/tcp/0/ws")


class Peer:
    """One peer, made by `open_peer`. `connections`, `discovery`, `reachability` and `server` are its parts."""

    def __init__(
        self,
        identity: Identity,
        connections: Connections,
        discovery: Discovery,
        reachability: Reachability,
        server: Server | None,
        checkpoints: Checkpoints,
        tasks: trio.Nursery,
        rules: ChainRules | None = None,
    ) -> None:
        self.identity = identity
        self.connections = connections
        self.discovery = discovery
        self.reachability = reachability
        self.server = server
        #: Our relay for peers that nobody can dial, and our reservations at other relays; each is None if we have none.
        self.relay: Relay | None = None
        self.reservations: Reservations | None = None
        #: The rules for the peers in our chains; None allows every peer.
        self.rules = rules
        self._checkpoints = checkpoints
        self._tasks = tasks
        self._spans: SpanHost | None = None
        if server is not None:
            self._spans = SpanHost(self.peer_id, connections, discovery, server, checkpoints, tasks, rules)

    def __repr__(self) -> str:
        return f"<Peer {self.peer_id} {' '.join(str(served.span) for served in self.served) or 'client'}>"

    @property
    def peer_id(self) -> PeerId:
        """This peer's PeerId."""
        return self.identity.peer_id

    @property
    def addresses(self) -> tuple[Multiaddr, ...]:
        """Where others can dial us, each address with our PeerId."""
        return tuple(address.with_peer(self.peer_id) for address in self.connections.announced)

    @property
    def served(self) -> tuple[ServedSpan, ...]:
        """The spans that we serve."""
        return self.server.spans if self.server is not None else ()

    def want_relays(self) -> None:
        """Hold reservations at relays while others cannot dial us, and give them back when they can."""
        if self.reservations is not None:
            self.reservations.wanted = self.reachability.wants_relays

    def offer_relay(self) -> None:
        """Announce that we are a relay, unless other peers cannot dial us."""
        if self.relay is not None:
            reachable = self.reachability.reach is not Reach.PRIVATE
            self.connections.roles = (RELAY_ROLE,) if reachable else ()
            if not reachable:
                log.warning("nobody can dial us, so we relay for nobody")

    async def drain(self, timeout_s: float) -> None:
        """Announce that we leave, refuse new sessions, and wait at most `timeout_s` for the others to end."""
        if self.relay is not None:
            self.relay.draining = True
        if self._spans is not None:
            await self._spans.drain(timeout_s)

    @asynccontextmanager
    async def model(self, path: str | Path, *, revision: str | None = None) -> AsyncIterator[SwarmModel]:
        """A model whose blocks the swarm serves. Its head comes from `path`: a path or hub id, `org/name` or
        `org/name@revision`.

        Waits at most a second for the delays to the servers. Raises CheckpointError.
        """
        await import_in_thread("peerd.compute.model.head", "peerd.client.open_model")
        from peerd.client.open_model import open_model

        async with self._checkpoints.open(path, revision) as checkpoint, open_model(self, checkpoint) as model:
            yield model

    @asynccontextmanager
    async def blocks(
        self, path: str | Path, on_checkpoint: Callable[[Checkpoint], None], *, revision: str | None = None
    ) -> AsyncIterator[ServedBlocks]:
        """Only the blocks of a model, for a program with a head of its own. `path`: see `model`.

        `on_checkpoint` reads what the program needs. It runs in a worker thread once the head's files are here; the
        checkpoint is closed before the blocks are yielded. Raises CheckpointError, and what `on_checkpoint` raises.
        """
        await import_in_thread("peerd.compute.model.head", "peerd.client.open_model")
        from peerd.client.open_model import facts_of, open_blocks

        async with self._checkpoints.open(path, revision) as checkpoint:
            await fetch_head(checkpoint)
            await trio.to_thread.run_sync(on_checkpoint, checkpoint)
            facts = facts_of(checkpoint)
        async with open_blocks(self, facts) as blocks:
            yield blocks

    @property
    def hub(self) -> HubSettings:
        """How adapters of a client are fetched from the hub."""
        return self._checkpoints.settings

    @property
    def prober(self) -> Prober:
        """Measures delays to other peers over our connections. Each access makes a new one."""
        return Prober(self.connections, self.discovery.track_record, self.discovery.may_dial)

    async def serve(self, spec: ServeSpec) -> tuple[ServedSpan, ...]:
        """Serve blocks of a model from now on, where others find them: one span for each of the spec's devices.

        If the spec names one device and no span, and does not say `stay`, the span moves later to blocks where the
        swarm needs it more; `served` shows its place. If the spec names no model, this waits until the swarm serves one
        that the spec allows. Raises CheckpointError, InvalidRequest.
        """
        if self._spans is None:
            raise InvalidRequest("this peer was opened as a client: name a first span in open_peer(serve=...)")
        return await self._spans.serve(spec)

    async def load_adapter(self, served: ServedSpan, name: str, path: str | Path) -> str:
        """Serve one more LoRA adapter, a directory that peft saved or a hub id, while sessions run; returns its id.

        Raises AdapterError if it does not fit, and InvalidRequest if no more adapters can be announced.
        """
        if self._spans is None:
            raise InvalidRequest("this peer serves nothing")
        return await self._spans.load_adapter(served, name, path)

    def unload_adapter(self, served: ServedSpan, adapter: str) -> None:
        """Offer an adapter (given by its id) to no new session, and free it after its last session. Raises KeyError."""
        if self._spans is None:
            raise InvalidRequest("this peer serves nothing")
        self._spans.unload_adapter(served, adapter)


@asynccontextmanager
async def open_peer(
    identity: Identity | None = None,
    *,
    listen: Sequence[Address] = (),
    announce: Sequence[Address] = (),
    bootstrap: Sequence[Address] = (),
    serve: Sequence[ServeSpec] = (),
    state_dir: Path | None = None,
    swarm_key: bytes | None = None,
    rules: ChainRules | None = None,
    hub: HubSettings | None = None,
    relay: RelayLimits | None = None,
    may_be_relayed: bool = True,
    transport: Transport | None = None,
    now: Callable[[], float] = time.time,
) -> AsyncIterator[Peer]:
    """Run a peer until the block ends. Yields once everything in `serve` is served. Works in any Trio program.

    identity: who we are; None makes a new identity that is not saved.
    listen: where to accept connections; without any we are a client, which others cannot dial.
    announce: the addresses that others are told to dial, instead of `listen` (forwarded ports, proxies).
    bootstrap: addresses of peers of the swarm, each with its PeerId.
    state_dir: the folder for the routing table and the last `seq`; None for a peer that will not start again.
    swarm_key: 32 bytes that all peers of a private swarm share.
    rules: which peers may be in our chains.
    relay: the limits of our relay for peers that nobody can dial; None for no relay.
    may_be_relayed: whether we may use relays, to be reached if nobody can dial us, and to reach such peers.
    hub: how models with a hub id are downloaded; None takes huggingface_hub's environment variables.

    Raises OSError if an address is taken, ValueError for a malformed one, CheckpointError, PeerdError.
    """
    identity = identity or Identity.generate()
    transport = transport or WebSocketTransport()
    # What the system says of its clock says nothing of another one.
    clock = SwarmClock(now, is_clock_kept) if now is time.time else SwarmClock(now)
    async with open_tasks() as tasks:
        containment = Containment()
        server = await _start_server(tasks, clock, containment) if serve else None
        async with open_connections(
            identity,
            transport=transport,
            listen=_parsed(listen),
            handlers=server.handlers if server else {},
            swarm_key=swarm_key,
            roles=(RELAY_ROLE,) if relay else (),
            may_be_relayed=may_be_relayed,
            now=now,
            containment=containment,
        ) as connections:
            relaying = Relay(identity.peer_id, relay) if relay else None
            if relaying is not None:
                connections.handlers[RELAY_PROTOCOL] = relaying.answer
            reachability = Reachability(
                connections,
                lambda: _parsed(announce) or dialable_forms(connections.listen_addresses),
                fixed=bool(announce),
                bootstrap=_parsed(bootstrap),
                random=Random(os.urandom(16)),
                now=now,
            )
            _limit_dials(connections, _parsed(bootstrap))
            first = reachability.announced
            connections.announced = first.addresses
            if connections.listen_addresses:
                answerer = DialbackAnswerer(transport, lambda: connections.announced, swarm_key)
                connections.handlers[DIALBACK_PROTOCOL] = answerer.answer
            async with open_discovery(
                connections,
                identity,
                _parsed(bootstrap),
                state_dir=state_dir,
                random=Random(os.urandom(16)),
                clock=clock,
                addresses=first.addresses,
                contacts=first.contacts,
            ) as discovery:

                def announce_now(where: Announced) -> None:
                    connections.announced = where.addresses
                    discovery.reachable_at(where.addresses, where.contacts)

                # No peer's blocks are nearer than our own.
                discovery.track_record.measured(identity.peer_id, 0.0)
                async with open_tasks() as moving, AsyncExitStack() as stack:
                    checkpoints = Checkpoints(hub or HubSettings())
                    peer = Peer(identity, connections, discovery, reachability, server, checkpoints, moving, rules)
                    peer.relay = relaying
                    reachability.on_changed.append(peer.offer_relay)
                    if server and may_be_relayed:
                        # A peer that serves nothing need not be reachable.
                        keeping = open_reservations(
                            connections,
                            discovery.contacts,
                            discovery.relayed_by,
                            Random(os.urandom(16)),
                            wanted=reachability.wants_relays,
                        )
                        peer.reservations = await stack.enter_async_context(keeping)
                        reachability.on_changed.append(peer.want_relays)
                    keep = connections.containment.keep_running
                    moving.start_soon(partial(keep, reachability.run, announce_now, what="checking who can dial us"))
                    if server:
                        server.attach(connections)
                    for spec in serve:
                        await peer.serve(spec)
                    yield peer


def _limit_dials(connections: Connections, bootstrap: Sequence[Multiaddr]) -> None:
    """Configure the connections so that addresses named by other peers lead only into networks in which we are
    ourselves.
    """
    connections.trust(bootstrap)

    def ours() -> Sequence[Multiaddr]:
        # Neighbours in our own network meet there, even if the swarm is on the internet.
        return (*bootstrap, *connections.announced, *own_networks())

    connections.own_policy = DialPolicy(ours)


async def _start_server(tasks: trio.Nursery, clock: SwarmClock, containment: Containment) -> Server:
    # Serving needs torch, whose import would delay peers that only keep the DHT.
    from peerd.server.server import Server

    server = Server(clock, containment)
    await tasks.start(server.run)
    return server


def _parsed(addresses: Sequence[Address]) -> tuple[Multiaddr, ...]:
    return tuple(Multiaddr.parse(address) if isinstance(address, str) else address for address in addresses)
