"""Makes connections over channels: with our identity, our limits, and memory from the budget that all share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import trio

from peerd.net.connection.peer_connection import PeerConnection
from peerd.net.containment import Containment
from peerd.net.dialling.circuits import CircuitChannel
from peerd.net.handlers import StreamHandler
from peerd.net.limits.entry_rates import EntryRates
from peerd.net.limits.gate import host_of
from peerd.net.stream import Carrier
from peerd.net.transport import MessageChannel
from peerd.protocol.connection.budget import BufferBudget
from peerd.protocol.connection.connection import ConnectionMachine, Limits
from peerd.protocol.connection.frames import MAX_PAYLOAD_BYTES
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.messages.relay import INNER_PAYLOAD_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class ConnectionMaker:
    """What all connections of a peer have in common.

    swarm_key: the private swarm's 32 bytes; None for an open one. handlers: of the streams that peers open; they may
    change. budget: how many bytes peers may make us hold. on_lost: called with each connection that has ended.
    """

    identity: Identity
    swarm_key: bytes | None
    limits: Limits
    budget: BufferBudget
    handlers: Mapping[str, StreamHandler]
    containment: Containment
    rates: EntryRates
    on_lost: Callable[[PeerConnection], None]

    def make(
        self, channel: MessageChannel, *, initiator: bool, expected: PeerId | None = None, punched: bool = False
    ) -> PeerConnection:
        """Make a connection; nothing runs yet.

        initiator: whether we dialled. expected: the peer that must prove its identity; None takes any. punched: whether
            both sides dialled, and `initiator` is what they agreed on.
        """
        relay = relay_of(channel)
        # Connections from one network share one owner's limit on buffers. A proxy's address does not identify a peer.
        owner = host_of(channel.remote_ip if relay is None else relay.remote_ip)
        core = ConnectionMachine(
            self.identity,
            initiator=initiator,
            now=trio.current_time(),
            expected=expected,
            swarm_key=self.swarm_key,
            limits=self.limits,
            payload_bytes=MAX_PAYLOAD_BYTES if relay is None else INNER_PAYLOAD_BYTES,
            buffers=self.budget.open(owner),
        )
        return PeerConnection(
            core,
            channel,
            own=self.identity.peer_id,
            handlers=self.handlers,
            containment=self.containment,
            rates=self.rates,
            on_lost=self.on_lost,
            relay=relay,
            far_ip=channel.far_ip if isinstance(channel, CircuitChannel) else None,
            punched=punched,
        )


def relay_of(channel: MessageChannel) -> Carrier | None:
    """The connection to the relay through which a channel leads; None for a direct one."""
    return channel.relay if isinstance(channel, CircuitChannel) else None
