"""A client's scout and servers' neighbours in a swarm in memory, with delays between all hosts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest
import torch
import trio

from peerd.client.finding.finder import SwarmFinder
from peerd.client.finding.scout import FIRST_PROBES, IDLE_S, LOOK_S, MAX_AGE_S, PLANS, ROUND_S, Scout
from peerd.discovery.prober import RttProber
from peerd.net.connections import PeerConnection
from peerd.protocol.identity import PeerId
from peerd.protocol.records.envelope import ServerRecord, block_roots
from peerd.protocol.span import Span
from peerd.routing.chains.adapter_choice import NO_ADAPTER
from peerd.routing.chains.rules import ChainRules, Manifest
from peerd.routing.directory.offer import Offer
from peerd.routing.failures.track_record import TrackRecord
from peerd.spans.neighbours import FIRST_ROUND_S, Neighbours
from peerd.trio_tools import open_tasks

BLOCKS = Span(0, 8)


@dataclass
class Announced:
    """The directory: all online peers, with their announcements."""

    swarm: Any
    filled: dict[PeerId, Callable[[list[ServerRecord]], list[ServerRecord]]] = field(default_factory=dict)

    def doubt(self, peer_id: PeerId) -> None:
        """No server moves here."""

    async def servers(self, model: bytes, block_count: int, *, max_age_s: float = 0.0) -> list[Offer]:
        await trio.lowlevel.checkpoint()
        offers = [host.offer() for host in self.swarm.hosts if host.online]
        return [
            replace(offer, record=self.filled.get(offer.peer_id, lambda records: records)([offer.record])[0])
            for offer in offers
        ]


@dataclass
class Scouted:
    """A client with a scout."""

    client: Any
    finder: SwarmFinder
    scout: Scout
    track_record: TrackRecord


def scouted(client: Any, announced: Announced, rules: ChainRules | None = None) -> Scouted:
    track_record = client.finder.track_record
    finder = SwarmFinder(
        announced, track_record, bytes(range(32)), 8, Random(1), rules, connected=client.connections.live.keys
    )
    scout = Scout(finder, RttProber(client.connections, track_record, lambda addresses: addresses), BLOCKS, Random(2))
    client.finder = finder
    return Scouted(client, finder, scout, track_record)


async def run_neighbours(swarm: Any, announced: Announced, tasks: trio.Nursery) -> None:
    for host in swarm.hosts:
        track_record = TrackRecord(trio.current_time)
        prober = RttProber(host.connections, track_record, lambda addresses: addresses)
        neighbours = Neighbours(
            host.peer_id,
            announced,
            track_record,
            prober,
            Random(host.ip),
            ChainRules(),
            lambda host=host: [host.offer().record],
        )
        neighbours.serves(bytes(range(32)), 8)
        announced.filled[host.peer_id] = neighbours.filled
        tasks.start_soon(neighbours.run)


async def test_a_chain_stays_on_the_continent_of_its_client(open_swarm) -> None:
    async with open_swarm() as swarm, open_tasks() as tasks:
        # Alternately near and far, with spans that overlap; no server has all blocks.
        hosts = [await swarm.serve(*span) for span in [(0, 5), (0, 5), (3, 8), (3, 8), (2, 6), (1, 7)]]
        client = await swarm.client()
        places = {host.ip: number % 2 for number, host in enumerate(hosts)} | {client.ip: 0}
        for one in places:
            for other in places:
                swarm.network.set_latency(one, other, 0.005 if places[one] == places[other] else 0.075)
        announced = Announced(swarm)
        ours = scouted(client, announced)
        tasks.start_soon(ours.scout.run)
        await run_neighbours(swarm, announced, tasks)
        await trio.sleep(2 * FIRST_ROUND_S)
        await ours.finder.offers(0.0)
        for _ in range(10):
            chain = await ours.finder.find(BLOCKS, tokens=10, exclude=())
            assert {places[host.ip] for hop in chain.hops for host in hosts if host.peer_id == hop.peer_id} == {0}
            # There, 10 ms; between two hops, 10 ms at most; and back.
            assert chain.cost_s < 0.1
        assert all(ours.track_record.rtt_s(host.peer_id) is not None for host in hosts)
        tasks.cancel_scope.cancel()


async def test_servers_announce_how_far_those_are_that_may_follow(open_swarm) -> None:
    async with open_swarm() as swarm, open_tasks() as tasks:
        first, near, far, before = [await swarm.serve(*span) for span in [(2, 5), (5, 8), (4, 8), (0, 2)]]
        swarm.network.set_latency(first.ip, near.ip, 0.01)
        swarm.network.set_latency(first.ip, far.ip, 0.1)
        announced = Announced(swarm)
        await run_neighbours(swarm, announced, tasks)
        await trio.sleep(2 * FIRST_ROUND_S)
        rtts = {offer.peer_id: dict(offer.record.rtts) for offer in await announced.servers(b"", 8)}
        assert list(rtts[first.peer_id]) == [near.peer_id, far.peer_id]
        assert rtts[first.peer_id] == pytest.approx({near.peer_id: 0.02, far.peer_id: 0.2})
        assert set(rtts[before.peer_id]) == {first.peer_id}
        # Whatever was opened for that is closed again.
        assert all(not host.connections.live for host in swarm.hosts)
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("rule", ["blocked", "not among the allowed", "not as the manifest says"])
async def test_a_peer_that_the_rules_leave_out_is_never_asked(open_swarm, rule: str) -> None:
    async with open_swarm() as swarm, open_tasks() as tasks:
        hosts = [await swarm.serve(0, 8) for _ in range(3)]
        dialled: list[PeerId] = []
        hosts[0].connections.on_connected.append(lambda connection: dialled.append(connection.peer_id))
        others = frozenset(host.peer_id for host in hosts[1:])
        announced = Announced(swarm)
        if rule == "blocked":
            rules = ChainRules(blocked=frozenset({hosts[0].peer_id}))
        elif rule == "not among the allowed":
            rules = ChainRules(allowed=others)
        else:
            manifest = Manifest(bytes(range(32)), tuple(bytes([block]) * 32 for block in range(8)))
            rules = ChainRules(manifests=(manifest,))
            for peer in others:
                announced.filled[peer] = lambda records: [
                    replace(record, block_roots=block_roots(record.span, manifest.blocks)) for record in records
                ]
        client = await swarm.client()
        ours = scouted(client, announced, rules)
        tasks.start_soon(ours.scout.run)
        await ours.scout.ready.wait()
        assert set(ours.track_record.rtts_s()) == others
        assert dialled == []
        tasks.cancel_scope.cancel()


async def test_of_many_peers_a_few_are_asked_and_no_connection_stays(open_swarm) -> None:
    async with open_swarm() as swarm, open_tasks() as tasks:
        for number in range(3 * FIRST_PROBES):
            await swarm.serve(4 * (number % 2), 4 * (number % 2) + 4)
        client = await swarm.client()
        ours = scouted(client, Announced(swarm))
        tasks.start_soon(ours.scout.run)
        await ours.scout.ready.wait()
        assert len(ours.track_record.rtts_s()) == FIRST_PROBES
        # A few that a first chain is likely to have, for a moment.
        assert len(client.connections.live) <= 2 * PLANS
        await trio.sleep(2 * ROUND_S)
        assert not client.connections.live
        tasks.cancel_scope.cancel()


async def test_the_first_session_dials_nobody_again(open_swarm) -> None:
    async with open_swarm() as swarm, open_tasks() as tasks:
        hosts = [await swarm.serve(*span) for span in [(0, 4), (4, 8), (0, 4), (4, 8), (0, 8)]]
        client = await swarm.client()
        for number, host in enumerate(hosts):
            swarm.network.set_latency(client.ip, host.ip, 0.005 if number < 2 else 0.1)
        ours = scouted(client, Announced(swarm))
        tasks.start_soon(ours.scout.run)
        await ours.scout.ready.wait()
        new: list[PeerId] = []
        client.connections.on_connected.append(lambda connection: new.append(connection.peer_id))
        session = await client.session(BLOCKS)
        await session.step(torch.ones(1, 8))
        assert [hop.peer for hop in session.chain] == [host.peer_id for host in hosts[:2]]
        assert new == []
        session.close()
        tasks.cancel_scope.cancel()


async def test_a_model_that_nobody_uses_asks_nobody(open_swarm) -> None:
    async with open_swarm() as swarm, open_tasks() as tasks:
        host = await swarm.serve(0, 8)
        client = await swarm.client()
        ours = scouted(client, Announced(swarm))
        tasks.start_soon(ours.scout.run)
        await ours.scout.ready.wait()
        dialled: list[PeerConnection] = []
        host.connections.on_connected.append(dialled.append)
        await trio.sleep(10 * IDLE_S)
        assert dialled == []
        await ours.finder.find(BLOCKS, tokens=10, exclude=())
        await trio.sleep(IDLE_S)
        asked = len(dialled)
        assert 2 <= asked <= 6
        await trio.sleep(10 * IDLE_S)
        assert len(dialled) == asked
        tasks.cancel_scope.cancel()


async def test_no_connection_stays_to_a_server_that_came_as_the_model_fell_out_of_use(open_swarm) -> None:
    async with open_swarm() as swarm, open_tasks() as tasks:
        await swarm.serve(0, 8)
        client = await swarm.client()
        ours = scouted(client, Announced(swarm))
        tasks.start_soon(ours.scout.run)
        await ours.scout.ready.wait()
        met: list[PeerConnection] = []
        client.connections.on_connected.append(met.append)
        await ours.finder.find(BLOCKS, tokens=10, exclude=())
        await trio.sleep(IDLE_S - MAX_AGE_S)
        newcomers = []
        for _ in range(5):
            newcomers.append((await swarm.serve(0, 8)).peer_id)
            await trio.sleep(MAX_AGE_S / 5)
        await trio.sleep(IDLE_S)
        assert {connection.peer_id for connection in met} & set(newcomers)
        assert not client.connections.live
        tasks.cancel_scope.cancel()


async def test_the_replacement_of_a_dead_hop_is_connected_already(open_swarm, whole_forward) -> None:
    async with open_swarm() as swarm, open_tasks() as tasks:
        hosts = [await swarm.serve(*span) for span in [(0, 4), (4, 8), (4, 8), (0, 4)]]
        client = await swarm.client()
        for host in hosts[2:]:
            swarm.network.set_latency(client.ip, host.ip, 0.006)
        ours = scouted(client, Announced(swarm))
        tasks.start_soon(ours.scout.run)
        session = await client.session(BLOCKS)
        ours.scout.watch(session, tokens=512, adapter=NO_ADAPTER)
        hidden = torch.arange(24.0).view(3, 8)
        parts = [await session.step(hidden[:1])]
        await trio.sleep(LOOK_S + 1)
        in_chain = {hop.peer for hop in session.chain}
        others = {host.peer_id for host in hosts} - in_chain
        assert ours.scout.standbys == others
        assert set(client.connections.live) == in_chain | others
        new: list[PeerId] = []
        client.connections.on_connected.append(lambda connection: new.append(connection.peer_id))
        dead = next(host for host in hosts if host.peer_id == session.chain[1].peer)
        swarm.kill(dead)
        parts.append(await session.step(hidden[1:2]))
        assert session.failovers == 1
        assert session.chain[1].peer in others
        assert new == []
        parts.append(await session.step(hidden[2:]))
        assert torch.equal(torch.cat(parts), whole_forward(hidden, 8))
        # With the session its second choices go, but for the one that was needed.
        needed = {hop.peer for hop in session.chain}
        session.close()
        await trio.sleep(IDLE_S + 2 * MAX_AGE_S)
        assert ours.scout.standbys == frozenset()
        assert (others - needed) & set(client.connections.live) == set()
        tasks.cancel_scope.cancel()


async def test_a_replacement_is_found_without_waiting_for_a_lookup(open_swarm) -> None:
    async with open_swarm() as swarm:
        hosts = [await swarm.serve(*span) for span in [(0, 4), (4, 8), (4, 8)]]
        announced = Announced(swarm)
        finder = scouted(await swarm.client(), announced).finder
        first = await finder.find(BLOCKS, tokens=10, exclude=())
        lost = first.hops[1].peer_id
        looked_up = announced.servers

        async def hang(*_: object, **__: object) -> list[Offer]:
            await trio.sleep_forever()
            raise AssertionError

        announced.servers = hang  # type: ignore[method-assign]
        with trio.fail_after(0.1):
            found = await finder.find(first.hops[1].span, tokens=10, exclude=(lost,), between=(hosts[0].peer_id, None))
        (hop,) = found.hops
        assert hop.peer_id in {host.peer_id for host in hosts[1:]} - {lost}
        # If no offers are known, new servers may have come.
        announced.servers = looked_up  # type: ignore[method-assign]
        late = await swarm.serve(4, 8)
        (hop,) = (
            await finder.find(
                first.hops[1].span, tokens=10, exclude=(lost, hop.peer_id), between=(hosts[0].peer_id, None)
            )
        ).hops
        assert hop.peer_id == late.peer_id
