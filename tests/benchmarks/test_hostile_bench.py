"""The sink of `bench-hostile`: attacks run against it as against a peer, and it drops what they send."""

from __future__ import annotations

from random import Random

import pytest
import trio

from benchmarks.swarms import hostile_sink
from benchmarks.swarms.hostile_attacks import Attackers
from benchmarks.swarms.hostile_sink import Sink
from peerd.net.websockets.transport import WebSocketTransport
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import PeerFault
from peerd.protocol.identity import Identity
from peerd.protocol.span import Span
from peerd.testing.hostile import HostilePeer, Target, hello_message, message_bytes

NOW = 1_800_000_000.0
IDENTITIES = sorted((Identity.from_seed(bytes([seed]) * 32) for seed in range(3)), key=lambda one: one.peer_id)


@pytest.mark.real_time
async def test_a_peer_of_either_rank_is_let_in_and_then_put_out(monkeypatch):
    monkeypatch.setattr(hostile_sink, "PROVEN_S", 0.05)
    low, sink, high = IDENTITIES
    async with trio.open_nursery() as nursery:
        port = await nursery.start(Sink(sink).run)
        for identity in (low, high):
            channel = await WebSocketTransport().dial(Multiaddr.parse(f"/ip4/127.0.0.1/tcp/{port}/ws"), nursery)
            peer = HostilePeer(identity, channel)
            await peer.enter(message_bytes(hello_message(NOW)))
            with pytest.raises(PeerFault):
                await channel.receive()
            await channel.aclose()
        nursery.cancel_scope.cancel()


@pytest.mark.real_time
async def test_attacks_of_several_kinds_end_there(monkeypatch):
    monkeypatch.setattr(hostile_sink, "PROVEN_S", 0.01)
    low, sink, _ = IDENTITIES
    async with trio.open_nursery() as nursery:
        port = await nursery.start(Sink(sink).run)
        target = Target(low.peer_id, bytes(32), Span(0, 4), 8)
        attackers = Attackers(Multiaddr.parse(f"/ip4/127.0.0.1/tcp/{port}/ws"), target, Random(1))
        nursery.start_soon(attackers.run, 60.0, 60.0)
        while len(attackers.sent) < 4:
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert sum(attackers.sent.values()) >= 4
