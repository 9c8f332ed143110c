"""Servers that move: in a whole swarm in memory, with its DHT, on a clock that jumps."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
import trio

from peerd.compute.errors import CheckpointError, DiskFullError
from peerd.protocol.span import Span
from peerd.spans.mover import LOOK_SPREAD, MAX_DRAIN_S
from peerd.testing.fake_engine import fake_forward
from peerd.trio_tools import open_tasks
from tests.fakes.moving_fixture import BLOCKS, MODEL, ROUND_S, TIMING, Peer, open_swarm, tokens, until


async def test_a_spare_server_closes_a_gap() -> None:
    async with open_swarm("0:4") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        await until(lambda: spare.spans == ["4:8"])
        assert spare.states() == {"4:8": "online"}
        async with swarm.session() as session:
            row = tokens(6)
            assert torch.equal(await session.step(row, want="all"), fake_forward(row, Span(0, 8)))


async def test_a_server_does_not_leave_its_blocks_to_one_that_it_cannot_reach() -> None:
    """Anybody can announce a server that is not there: then its blocks would have none."""
    async with open_swarm() as swarm:
        server = await swarm.serve("0:4", moves=True)
        ghost = await swarm.serve("0:4")
        here, there = (str(peer.discovery.dht.addresses[0].host) for peer in (server, ghost))
        swarm.network.partition(here, there)
        await trio.sleep(4 * ROUND_S)
        offers = await server.discovery.directory.servers(MODEL, BLOCKS, max_age_s=0.0)
        assert {offer.peer_id for offer in offers} >= {ghost.identity.peer_id}, "it is announced all the same"
        assert server.spans == ["0:4"]
        swarm.network.heal(here, there)
        await until(lambda: server.spans == ["4:8"])


async def test_the_old_engine_is_gone_before_the_new_one_is_loaded() -> None:
    async with open_swarm("0:4") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        assert spare.slot.served is not None
        engine = weakref.ref(spare.slot.served.task.engine)
        seen = []
        spare.loader.watch = lambda: seen.append(engine() is None)
        await until(lambda: spare.spans == ["4:8"])
        assert seen == [True]


async def test_others_hear_of_a_move_before_it_begins_and_while_it_lasts() -> None:
    async with open_swarm("0:4") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        seen: list[dict[str, str]] = []
        other = swarm.peers[1].discovery.directory
        with trio.move_on_after(ROUND_S + 60):
            while True:
                offers = await other.servers(MODEL, BLOCKS, max_age_s=0.0)
                states = {
                    str(offer.span): offer.record.state for offer in offers if offer.peer_id == spare.identity.peer_id
                }
                if not seen or seen[-1] != states:
                    seen.append(states)
                await trio.sleep(0.5)
        assert {"0:4": "online", "4:8": "joining"} in seen
        assert {"4:8": "joining"} in seen
        assert seen[-1] == {"4:8": "online"}
        assert {} not in seen


async def test_a_running_session_ends_before_its_server_goes() -> None:
    async with open_swarm("4:8") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        async with swarm.session() as session:
            row = tokens(20)
            expected = fake_forward(row, Span(0, 8))
            assert torch.equal(await session.step(row[:10], want="all"), expected[:10])
            for _ in range(2):
                await swarm.serve("0:4")
            position = 10
            while spare.states().get("0:4") != "draining":
                # Idle for five minutes it would be evicted.
                await trio.sleep(200)
                assert torch.equal(await session.step(row[position : position + 1]), expected[position : position + 1])
                position += 1
            assert torch.equal(await session.step(row[position:], want="all"), expected[position:])
            assert session.failovers == 0
            assert spare.server.sessions == 1
        # Its client has left.
        await until(lambda: spare.spans == ["4:8"], 60)


async def test_a_session_that_does_not_end_finds_another_server_and_loses_no_token(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_swarm("4:8") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        async with swarm.session() as session:
            row = tokens(30)
            expected = fake_forward(row, Span(0, 8))
            assert torch.equal(await session.step(row[:10], want="all"), expected[:10])
            # Now it is spare: another takes its place, and half of the servers of the other end.
            await swarm.serve("0:4")
            await swarm.serve("0:4")
            position = 10
            while spare.spans != ["4:8"]:
                await trio.sleep(60)
                if position < 29:
                    position += 1
                    assert torch.equal(
                        await session.step(row[position - 1 : position]), expected[position - 1 : position]
                    )
                assert trio.current_time() < 4 * ROUND_S + MAX_DRAIN_S
            assert "still in memory" not in caplog.text
            assert torch.equal(await session.step(row[position:], want="all"), expected[position:])
            assert session.failovers == 1


@pytest.mark.parametrize("seed", range(1, 3))
async def test_two_spare_servers_do_not_both_move_into_one_gap(seed: int) -> None:
    async with open_swarm("0:4") as swarm:
        # The same seed: both look at the same time, and hesitate as long, every time.
        spares = [await swarm.serve("0:4") for _ in range(2)]
        for spare in spares:
            spare.start_moving(seed)
        await trio.sleep(2 * ROUND_S)
        assert sum(spare.loader.loads.count(Span(4, 8)) for spare in spares) <= 1


async def test_of_several_spare_servers_one_closes_the_gap() -> None:
    async with open_swarm("0:4") as swarm:
        spares = [await swarm.serve("0:4", moves=True) for _ in range(2)]
        await trio.sleep(2 * ROUND_S)
        assert sum(spare.loader.loads.count(Span(4, 8)) for spare in spares) == 1
        assert ["4:8"] in [spare.spans for spare in spares]


@pytest.mark.parametrize("seed", range(1, 3))
async def test_no_server_uncovers_a_block_by_relying_on_one_that_also_moves(seed: int) -> None:
    async with open_swarm() as swarm, open_tasks() as tasks:
        # Two servers of the same blocks look at the same time, and each is drawn to another gap.
        spares = [await swarm.serve("2:4") for _ in range(2)]
        for spare, disk in zip(spares, ({0, 1}, {6, 7}), strict=True):
            spare.loader.disk = frozenset(disk)
            spare.start_moving(seed)
        tasks.start_soon(swarm.watch_coverage, range(2, 4))
        await trio.sleep(2 * ROUND_S)


async def test_a_named_span_and_the_only_server_of_a_block_stay() -> None:
    async with open_swarm("0:4") as swarm:
        lonely = await swarm.serve("4:8", moves=True)
        await swarm.serve("0:4")
        await trio.sleep(2 * ROUND_S)
        assert lonely.spans == ["4:8"]
        assert [peer.spans for peer in swarm.peers[1:]] == [["0:4"], ["4:8"], ["0:4"]]


async def test_what_cannot_be_fetched_costs_no_session(caplog: pytest.LogCaptureFixture) -> None:
    async with open_swarm("0:4") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        spare.loader.unfetchable[Span(4, 8)] = DiskFullError("the disk is full")
        await trio.sleep(2 * ROUND_S)
        assert spare.loader.loads == []
        assert spare.states() == {"0:4": "online"}
        assert "cannot move to other blocks: the disk is full; still serving 0:4" in caplog.text
        spare.loader.unfetchable.clear()
        await until(lambda: spare.spans == ["4:8"], 20 * ROUND_S)


async def test_a_load_that_fails_goes_back_and_is_tried_again_ever_later(caplog: pytest.LogCaptureFixture) -> None:
    async with open_swarm("0:4") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        spare.loader.failing[Span(4, 8)] = CheckpointError("a shard is damaged")
        times = []
        spare.loader.watch = lambda: times.append(trio.current_time())
        await until(lambda: len(spare.loader.loads) == 6, 40 * ROUND_S)
        await trio.sleep(30)
        assert spare.loader.loads == [Span(4, 8), Span(0, 4)] * 3
        assert spare.states() == {"0:4": "online"}
        assert "cannot load blocks 4:8: a shard is damaged; going back to 0:4" in caplog.text
        assert times[4] - times[2] > 2 * TIMING.look_s * (1 - LOOK_SPREAD) * 2
        async with swarm.session() as session:
            assert session is not None
        spare.loader.failing.clear()
        await until(lambda: spare.spans == ["4:8"], 40 * ROUND_S)


async def test_where_not_even_the_old_span_loads_nothing_is_announced_until_it_does() -> None:
    async with open_swarm("0:4") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        spare.loader.failing = {Span(4, 8): OSError("gone"), Span(0, 4): OSError("gone too")}
        await until(lambda: len(spare.loader.loads) >= 3)
        await until(lambda: spare.loader.loading is None and spare.states() == {})
        spare.loader.failing.clear()
        await until(lambda: spare.states() == {"0:4": "online"}, 4000)


async def test_a_server_that_sees_only_a_part_of_the_swarm_stays(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with open_swarm("0:4", "0:4", "0:4") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        # The bootstrap peer and two servers are away, as far as it can tell; the gap it sees would be one of many.
        hosts = [f"10.0.0.{number}" for number in range(1, 4)]
        for host in hosts:
            swarm.network.partition("10.0.0.5", host)
        await trio.sleep(2 * ROUND_S)
        assert spare.loader.loads == []
        assert "cannot see the whole swarm" in caplog.text
        for host in hosts:
            swarm.network.heal("10.0.0.5", host)
        await until(lambda: spare.spans == ["4:8"], 4 * ROUND_S)


PHASES: dict[str, Callable[[Peer], bool]] = {
    "intending": lambda peer: peer.states() == {"0:4": "online", "4:8": "joining"},
    "draining": lambda peer: peer.states().get("0:4") == "draining",
    "loading": lambda peer: peer.loader.loading == Span(4, 8),
    "going back": lambda peer: peer.loader.loading == Span(0, 4),
}


@pytest.mark.parametrize("phase", PHASES)
async def test_cancelled_in_any_phase_a_peer_serves_what_it_says(phase: str) -> None:
    async with open_swarm("4:8") as swarm:
        spare = await swarm.serve("0:4", moves=True)
        if phase == "going back":
            spare.loader.failing[Span(4, 8)] = CheckpointError("damaged")
        async with swarm.session() as session:
            row = tokens(8)
            expected = fake_forward(row, Span(0, 8))
            assert torch.equal(await session.step(row[:4], want="all"), expected[:4])
            await swarm.serve("0:4")
            await swarm.serve("0:4")
            for _ in range(40000):
                if PHASES[phase](spare):
                    break
                await trio.sleep(0.1)
            else:
                raise AssertionError(f"it was never {phase}")
            assert spare.rebalancer is not None
            spare.rebalancer.stop()
            await trio.sleep(60)
            still = [] if phase in ("loading", "going back") else ["0:4"]
            assert spare.spans == still
            assert spare.states() == dict.fromkeys(still, "online")
            assert torch.equal(await session.step(row[4:], want="all"), expected[4:])
            assert session.failovers == (0 if still else 1)
            offers = await swarm.peers[1].discovery.directory.servers(MODEL, BLOCKS, max_age_s=0.0)
            said = {str(offer.span): offer.record.state for offer in offers if offer.peer_id == spare.identity.peer_id}
            assert said == dict.fromkeys(still, "online")
