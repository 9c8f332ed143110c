"""A peer: its identity, its connections, the spans that it serves and the models that it uses, under one owner.

`open_peer` opens the rooms in order, each of which owns its tasks; a caller's exception comes out as it went in.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from peerd.checkpoints import Checkpoints, fetch_head
from peerd.client.audits.policy import AuditPolicy
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.discovery.discovery import Discovery
from peerd.discovery.kept_clock import is_clock_kept
from peerd.discovery.prober import RttProber
from peerd.meters import Meters
from peerd.net.connections import Connections
from peerd.net.containment import Containment
from peerd.net.websockets.transport import WebSocketTransport
from peerd.peer_parts import (
    PeerConfig,
    open_neighbourhood,
    open_net,
    open_own_discovery,
    open_own_reach,
    open_server,
    open_spans,
)
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.identity import Identity, PeerId
from peerd.reach.reachability import Reachability
from peerd.routing.chains.rules import ChainRules
from peerd.routing.clock import SwarmClock
from peerd.routing.reach.verdict import Whereabouts
from peerd.spans.host import SpanHost
from peerd.trio_tools import Watched, import_in_thread

if TYPE_CHECKING:
    from peerd.client.blocks import ServedBlocks
    from peerd.client.model import SwarmModel
    from peerd.compute.checkpoint.checkpoint import Checkpoint
    from peerd.net.transport import Transport
    from peerd.reach.relay import Relay
    from peerd.reach.relay_ledger import RelayLimits
    from peerd.reach.reservations import Reservations
    from peerd.server.served_spans import ServedSpan
    from peerd.server.server import Server
    from peerd.spans.spec import ServeSpec

Address = Multiaddr | str
# Every interface, any free port.
DEFAULT_LISTEN = Multiaddr.parse("/ip4/0.0.0.0/tcp/0/ws")


class Peer:
    """One peer, made by `open_peer`. `connections`, `discovery`, `reachability` and `server` are its parts."""

    def __init__(
        self,
        config: PeerConfig,
        connections: Connections,
        discovery: Discovery,
        reachability: Reachability,
        server: Server | None,
        spans: SpanHost | None,
        checkpoints: Checkpoints,
    ) -> None:
        self.identity = config.identity
        self.connections = connections
        self.discovery = discovery
        self.reachability = reachability
        self.server = server
        #: The rules for the peers in our chains; None allows every peer.
        self.rules = config.rules
        #: Opens models' checkpoints, from this machine or the hub.
        self.checkpoints = checkpoints
        #: How many of our answers are audited.
        self.audit = config.audit
        self._is_private = config.swarm_key is not None
        self._spans = spans

    def __repr__(self) -> str:
        return f"<Peer {self.peer_id} {' '.join(str(served.span) for served in self.served) or 'client'}>"

    @property
    def peer_id(self) -> PeerId:
        """This peer's PeerId."""
        return self.identity.peer_id

    @property
    def addresses(self) -> tuple[Multiaddr, ...]:
        """Where others can dial us, each address with our PeerId."""
        return tuple(address.with_peer(self.peer_id) for address in self.connections.listen_as)

    @property
    def served(self) -> tuple[ServedSpan, ...]:
        """The spans that we serve."""
        return self.server.spans if self.server is not None else ()

    @property
    def relay(self) -> Relay | None:
        """Our relay for peers that nobody can dial; None if we are none."""
        return self.reachability.relay

    @property
    def reservations(self) -> Reservations | None:
        """Our reservations at other relays; None for a peer that serves nothing, or that uses no relays."""
        return self.reachability.reservations

    async def drain(self, timeout_s: float) -> None:
        """Announce that we leave, refuse new sessions, and wait at most `timeout_s` for the others to end."""
        self.reachability.drain()
        if self._spans is not None:
            await self._spans.drain(timeout_s)

    async def pause(self, timeout_s: float) -> None:
        """Serve nothing new until `resume`, announce that, and give what is under way at most `timeout_s` to end.

        Clients of what is left then go on elsewhere. The blocks stay in memory.
        """
        if self._spans is not None:
            await self._spans.pause(timeout_s)

    def resume(self) -> None:
        """Serve again after `pause`, which must have ended or been cancelled."""
        if self._spans is not None:
            self._spans.resume()

    @asynccontextmanager
    async def model(
        self,
        path: str | Path,
        *,
        revision: str | None = None,
        draft: str | Path | None = None,
        draft_device: str = "cpu",
        remote_head: bool = False,
    ) -> AsyncIterator[SwarmModel]:
        """A model whose blocks the swarm serves. Its head comes from `path`: a path or hub id, `org/name` or
        `org/name@revision`.

        draft: a small model with the same tokenizer, or a head that `peerd train-draft` made, as `path`. It is loaded
            whole onto `draft_device` of this machine, and guesses tokens for answers of one row; the tokens are the
            same.
        remote_head: have the last server draw the tokens, where it offers that; the tokens are the same. The matrix of
            the vocabulary is then not held here, unless an answer needs it.

        Waits at most a second for the delays to the servers. Raises CheckpointError, and InvalidRequest for a draft
        model with another tokenizer, or a head for a model of other sizes.
        """
        await import_in_thread("peerd.compute.model.head", "peerd.client.open_model")
        from peerd.client.open_model import open_model

        async with (
            self.checkpoints.open(path, revision) as checkpoint,
            open_model(self, checkpoint, remote_head=remote_head) as model,
        ):
            if draft is None:
                yield model
                return
            async with self.drafting(model, draft, device=draft_device):
                yield model

    @asynccontextmanager
    async def drafting(self, model: SwarmModel, draft: str | Path, *, device: str = "cpu") -> AsyncIterator[None]:
        """Let a small model or a draft head guess tokens for the answers of `model` that begin in the block; see
        `model`.
        """
        from peerd.client.open_model import drafting_head, open_drafting

        async with self.checkpoints.open_draft_head(draft) as folder:
            if folder is not None:
                async with drafting_head(model, folder, device):
                    yield
                return
        async with self.checkpoints.open(draft) as checkpoint, open_drafting(model, checkpoint, device):
            yield

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

        async with self.checkpoints.open(path, revision) as checkpoint:
            await fetch_head(checkpoint)
            await trio.to_thread.run_sync(on_checkpoint, checkpoint)
            facts = facts_of(checkpoint)
        async with open_blocks(self, facts) as blocks:
            yield blocks

    @property
    def hub(self) -> HubSettings:
        """How adapters of a client are fetched from the hub."""
        return self.checkpoints.settings

    @property
    def prober(self) -> RttProber:
        """Measures delays to other peers over our connections. Each access makes a new one."""
        return RttProber(self.connections, self.discovery.track_record, self.discovery.may_dial)

    async def serve(self, spec: ServeSpec) -> tuple[ServedSpan, ...]:
        """Serve blocks of a model from now on, where others find them: one span for each of the spec's devices.

        If the spec names one device and no span, and does not say `stay`, the span moves later to blocks where the
        swarm needs it more; `served` shows where. If the spec names no model, this waits until the swarm serves one
        that the spec allows. Raises CheckpointError, InvalidRequest.
        """
        if self._spans is None:
            raise InvalidRequest("this peer was opened as a client: name a first span in open_peer(serve=...)")
        if spec.head is None and not self._is_private:
            # Strangers would have us compute logits, and would be told tokens that nobody can check.
            spec = replace(spec, head=False)
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
    audit: float | None = None,
    hub: HubSettings | None = None,
    relay: RelayLimits | None = None,
    may_be_relayed: bool = True,
    may_punch: bool = True,
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
    audit: with which probability an answer is computed again by other servers, to find servers that compute something
        else; 0 for never. None takes 1/50, and 0 in a private swarm. An audit shows the answer to those servers.
    relay: the limits of our relay for peers that nobody can dial; None for no relay.
    may_be_relayed: whether we may use relays, to be reached if nobody can dial us, and to reach such peers.
    may_punch: whether we try to reach peers behind relays directly, through their NATs and ours. They learn our IP
        address then.
    hub: how models with a hub id are downloaded; None takes huggingface_hub's environment variables.

    Raises OSError if an address is taken, ValueError for a malformed one, CheckpointError, PeerdError.
    """
    config = PeerConfig(
        identity=identity or Identity.generate(),
        listen=_parsed(listen),
        announce=_parsed(announce),
        bootstrap=_parsed(bootstrap),
        serve=tuple(serve),
        state_dir=state_dir,
        swarm_key=swarm_key,
        rules=rules,
        audit=AuditPolicy.of(audit, is_private=swarm_key is not None),
        hub=hub or HubSettings(),
        relay=relay,
        may_be_relayed=may_be_relayed,
        may_punch=may_punch,
        transport=transport or WebSocketTransport(),
        now=now,
    )
    async with open_configured(config) as peer:
        yield peer


@asynccontextmanager
async def open_configured(config: PeerConfig) -> AsyncIterator[Peer]:
    """Be the peer that `config` describes until the block ends; see `open_peer`.

    The order is that of the endings, backwards: announcements go offline while connections still live, and connections
    close before the sessions whose streams they carry.
    """
    # What the system says of its clock says nothing of another one.
    clock = SwarmClock(config.now, is_clock_kept) if config.now is time.time else SwarmClock(config.now)
    checkpoints = Checkpoints(config.hub)
    containment, meters = Containment(), Meters()
    # How others reach us, which also says into which networks we may dial.
    where = Watched(Whereabouts())
    neighbours: list[Multiaddr] = []
    async with (
        open_server(config, clock, containment, meters) as server,
        open_net(config, server, containment, where, meters, neighbours) as connections,
        open_own_reach(config, connections, where) as reachability,
        open_own_discovery(config, connections, reachability, clock) as discovery,
        open_neighbourhood(config, connections, discovery, where, neighbours),
        open_spans(config, connections, discovery, reachability, server, checkpoints) as spans,
    ):
        peer = Peer(config, connections, discovery, reachability, server, spans, checkpoints)
        for spec in config.serve:
            await peer.serve(spec)
        yield peer


def _parsed(addresses: Sequence[Address]) -> tuple[Multiaddr, ...]:
    return tuple(Multiaddr.parse(address) if isinstance(address, str) else address for address in addresses)
