from __future__ import annotations

import pytest
import trio

from peerd.discovery.prober import PROBE_S, RttProber
from peerd.protocol.span import Span
from peerd.routing.failures.track_record import TrackRecord


def prober_of(client):
    track_record = TrackRecord(trio.current_time)
    return track_record, RttProber(client.connections, track_record, lambda addresses: addresses)


async def test_it_measures_how_far_each_peer_is(open_swarm) -> None:
    async with open_swarm() as swarm:
        hosts = [await swarm.serve(0, 4) for _ in range(3)]
        client = await swarm.client()
        for host, latency_s in zip(hosts, (0.001, 0.04, 0.15), strict=True):
            swarm.network.set_latency(client.ip, host.ip, latency_s)
        track_record, prober = prober_of(client)
        began = trio.current_time()
        await prober.probe([host.offer() for host in hosts])
        assert [track_record.rtt_s(host.peer_id) for host in hosts] == pytest.approx([0.002, 0.08, 0.3], abs=1e-6)
        # All at once: no longer than the farthest takes to be dialled and asked.
        assert trio.current_time() - began < PROBE_S


async def test_it_closes_the_connections_that_it_opened_unless_they_are_used(open_swarm) -> None:
    async with open_swarm() as swarm:
        hosts = [await swarm.serve(0, 4) for _ in range(4)]
        caller = await swarm.caller()
        await caller.open(hosts[0])
        track_record, prober = prober_of(caller)
        await prober.probe([host.offer() for host in hosts[:3]])
        prober.close_unused({hosts[1].peer_id})
        assert set(caller.connections.live) == {hosts[0].peer_id, hosts[1].peer_id}
        # What was kept for a while is closed later, unless it came into use.
        await caller.open(hosts[1])
        await prober.probe([hosts[3].offer()])
        prober.close_unused()
        assert set(caller.connections.live) == {hosts[0].peer_id, hosts[1].peer_id}
        await trio.sleep(1)
        assert hosts[2].connections.live == hosts[3].connections.live == {}
        assert len(track_record.rtts_s()) == 4


async def test_one_that_does_not_answer_keeps_nobody_waiting_for_long(open_swarm) -> None:
    async with open_swarm() as swarm:
        silent, other = [await swarm.serve(0, 4) for _ in range(2)]
        client = await swarm.client()
        swarm.network.partition(client.ip, silent.ip)
        track_record, prober = prober_of(client)
        began = trio.current_time()
        await prober.probe([silent.offer(), other.offer()])
        prober.close_unused()
        assert trio.current_time() - began == pytest.approx(PROBE_S)
        assert list(track_record.rtts_s()) == [other.peer_id]
        # Slow is not dead: sessions may still try.
        assert not track_record.is_avoided(silent.peer_id)
        # A dial that succeeds after all leaves nothing behind.
        swarm.network.heal(client.ip, silent.ip)
        await trio.sleep(20)
        prober.close_unused()
        assert not client.connections.live


async def test_one_that_is_announced_but_gone_is_avoided(open_swarm) -> None:
    async with open_swarm() as swarm:
        gone = await swarm.serve(0, 4)
        client = await swarm.client()
        swarm.kill(gone)
        track_record, prober = prober_of(client)
        await prober.probe([gone.offer()])
        assert track_record.is_avoided(gone.peer_id)


async def test_only_addresses_that_may_be_dialled_are(open_swarm) -> None:
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        client = await swarm.client()
        track_record = TrackRecord(trio.current_time)
        await RttProber(client.connections, track_record, lambda addresses: ()).probe([host.offer()])
        assert track_record.rtts_s() == {}
        assert host.connections.live == {}
        assert host.span == Span(0, 4)


async def test_one_that_we_may_not_dial_unasked_is_not_blamed_for_it(open_swarm) -> None:
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        client = await swarm.client()
        track_record = TrackRecord(trio.current_time)
        await RttProber(client.connections, track_record, lambda _: ()).probe([host.offer()])
        assert not track_record.is_avoided(host.peer_id)
        assert not client.connections.live
