"""Deaths, hangs and broken links at every hop of a chain, during every kind of request: the results are the same, and
no surviving hop computes a position twice.
"""

from __future__ import annotations

import pytest
import torch
import trio

from peerd.client.finding.finder import Patience
from peerd.compute.adapters.lora import LoraPair
from peerd.protocol.errors import NoChain
from peerd.protocol.rows import Drop, Fork, RowSlice
from peerd.protocol.span import Span
from peerd.testing.fake_engine import FAKE_LAYER, fake_forward

WIDTH = 8
HOPS = 4
BLOCKS = Span(0, 3 * HOPS)
ADAPTER = {
    (block, FAKE_LAYER): LoraPair(torch.full((2, WIDTH), 0.5), torch.full((WIDTH, 2), float(block + 1)), 2.0)
    for block in range(BLOCKS.start, BLOCKS.end)
}


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 251, (count, WIDTH), generator=generator).float()


def expected(row: torch.Tensor, lora=None) -> torch.Tensor:
    return fake_forward(row, BLOCKS, lora)


async def serve(swarm, hop: int, **more):
    return await swarm.serve(3 * hop, 3 * hop + 3, client_adapters=2**20, **more)


async def open_chain(swarm, client, **terms):
    """A host a hop, and a session along them that is open."""
    hosts = [await serve(swarm, hop) for hop in range(HOPS)]
    session = await client.session(BLOCKS, **terms)
    await session.open()
    return hosts, session


# What is under way when a hop dies. Each function returns how many positions it submitted.

ROW, BRANCH = tokens(340), tokens(20, 1)


async def prefill(session) -> int:
    assert torch.equal(await session.step(ROW, want="all"), expected(ROW))
    return len(ROW)


async def decode(session) -> int:
    result = await session.step(ROW[40:41], start=40)
    assert torch.equal(result, expected(ROW[:41])[40:])
    return 1


async def forks(session) -> int:
    """Three steps at once: one that adds, one that forks, and one that moves rows in a ring and drops one."""
    base = ROW[:40]
    results = {}

    async def step(name: str, hidden: torch.Tensor, row: int, start: int, ops=()) -> None:
        results[name] = await session.step(hidden, row=row, start=start, ops=ops, want="all")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(step, "adds", BRANCH[:1], 0, 40)
        await trio.sleep(0.001)
        nursery.start_soon(step, "forks", BRANCH[1:3], 1, 30, [Fork(0, 1, 30)])
        await trio.sleep(0.001)
        ring = [Fork(1, 2, 31), Fork(0, 1, 35), Drop(0)]
        nursery.start_soon(step, "moves", BRANCH[3:4], 2, 31, ring)
    assert torch.equal(results["adds"], expected(torch.cat([base, BRANCH[:1]]))[40:])
    assert torch.equal(results["forks"], expected(torch.cat([base[:30], BRANCH[1:3]]))[30:])
    moved = torch.cat([base[:30], BRANCH[1:2], BRANCH[3:4]])
    assert torch.equal(results["moves"], expected(moved)[31:])
    # And every row is what it should be.
    last = await session.step(BRANCH[4:6], rows=[RowSlice(1, 35, 1), RowSlice(2, 32, 1)])
    rows = [torch.cat([base[:35], BRANCH[4:5]]), torch.cat([moved, BRANCH[5:6]])]
    assert torch.equal(last, torch.cat([expected(row)[-1:] for row in rows]))
    return 1 + 2 + 1 + 2


async def rollbacks(session) -> int:
    """Three steps at once: one that adds, one that cuts far below it, and one that goes on from there."""
    results = {}

    async def step(name: str, hidden: torch.Tensor, start: int) -> None:
        results[name] = await session.step(hidden, start=start, want="all")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(step, "adds", BRANCH[:2], 40)
        await trio.sleep(0.001)
        nursery.start_soon(step, "cuts", BRANCH[2:4], 10)
        await trio.sleep(0.001)
        nursery.start_soon(step, "goes on", BRANCH[4:5], 12)
    cut = torch.cat([ROW[:10], BRANCH[2:5]])
    assert torch.equal(results["adds"], expected(torch.cat([ROW[:40], BRANCH[:2]]))[40:])
    assert torch.equal(torch.cat([results["cuts"], results["goes on"]]), expected(cut)[10:])
    return 2 + 2 + 1


async def adapted(session) -> int:
    assert torch.equal(await session.step(ROW[40:42], start=40, want="all"), expected(ROW[:42], ADAPTER)[40:])
    return 2


DEATHS = {
    "the first": [0],
    "one in the middle": [1],
    "the last": [HOPS - 1],
    "two beside each other": [1, 2],
    "two apart": [0, 2],
    "all but one": [0, 1, 3],
    "a replacement too": [2],
}


@pytest.mark.parametrize("under_way", [prefill, decode, forks, rollbacks, adapted], ids=lambda case: case.__name__)
@pytest.mark.parametrize("deaths", DEATHS)
async def test_after_any_death_survivors_compute_nothing_twice(open_swarm, deaths, under_way):
    async with open_swarm() as swarm:
        client = await swarm.client()
        own = {"own_adapter": ADAPTER} if under_way is adapted else {}
        hosts, session = await open_chain(swarm, client, max_rows=3, **own)
        asked = 0
        if under_way is not prefill:
            await session.step(ROW[:40])
            asked = 40
        twins = [await serve(swarm, hop) for hop in DEATHS[deaths]]

        async def die() -> None:
            # The step has passed half of the chain, or all pieces of a prompt are somewhere in it.
            await trio.sleep(0.035)
            for hop in DEATHS[deaths]:
                swarm.kill(hosts[hop])
            if deaths == "a replacement too":
                twins.append(await serve(swarm, DEATHS[deaths][0]))
                while not any(twin.server.sessions for twin in twins):
                    await trio.sleep(0.001)
                await trio.sleep(0.012)
                swarm.kill(next(twin for twin in twins if twin.server.sessions))

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(die)
                asked += await under_way(session)
            # If the dead hop had done its part already, the next step notices its death.
            await session.step(ROW[:0])
        assert session.failovers >= 1
        assert session.reopened == 0
        for hop, host in enumerate(hosts):
            if hop not in DEATHS[deaths]:
                assert host.task.engine.positions_computed == asked


@pytest.mark.parametrize("later", [prefill, forks, rollbacks], ids=lambda case: case.__name__)
async def test_a_second_death_finds_all_hops_in_step(open_swarm, later):
    """What a replacement was brought to serves to bring the next one there."""
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client, max_rows=3)
        if later is not prefill:
            await session.step(ROW[:40])
        for hop in (1, 0, 2):
            await serve(swarm, hop)
            swarm.kill(next(h for h in swarm.hosts if h.online and h.peer_id == session.chain[hop].peer))
            await session.step(BRANCH[:0])
        before = hosts[3].task.engine.positions_computed
        asked = await later(session)
        assert hosts[3].task.engine.positions_computed == before + asked
        assert session.failovers == 3


async def test_a_death_that_leaves_two_peers_to_share_its_blocks_is_mended_by_both(open_swarm):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client)
        await session.step(ROW[:40])
        await swarm.serve(3, 4)
        await swarm.serve(4, 6)
        swarm.kill(hosts[1])
        await decode(session)
        assert [hop.span.start for hop in session.chain] == [0, 3, 4, 6, 9]
        assert all(hosts[hop].task.engine.positions_computed == 41 for hop in (0, 2, 3))


@pytest.mark.parametrize("hop", range(HOPS))
async def test_a_kill_costs_its_session_round_trips_and_the_replay_and_no_waiting(open_swarm, hop):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client)
        await session.step(ROW[:40])
        undisturbed_s = await stall_s(session, ROW, 40, 5)
        await serve(swarm, hop)
        swarm.kill(hosts[hop])
        # 5 ms a way, and 10 ms of computing: dialling, the handshake, `open`, `route`, and a link of its own.
        assert await stall_s(session, ROW, 45, 1) - undisturbed_s < 0.08


# Hangs.


async def stall_s(session, row: torch.Tensor, start: int, count: int) -> float:
    """The longest time that a token took."""
    longest = 0.0
    for position in range(start, start + count):
        before = trio.current_time()
        result = await session.step(row[position : position + 1])
        assert torch.equal(result, expected(row[: position + 1])[position:])
        longest = max(longest, trio.current_time() - before)
    return longest


@pytest.mark.parametrize("hop", range(HOPS))
async def test_a_frozen_server_is_overtaken_in_less_than_two_seconds(open_swarm, hop):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client)
        await session.step(ROW[:40])
        await stall_s(session, ROW, 40, 10)
        await serve(swarm, hop)
        swarm.network.stop(hosts[hop].ip)
        assert await stall_s(session, ROW, 50, 3) < 2
        assert session.failovers == 1
        survivors = [host for host in hosts if host is not hosts[hop]]
        assert all(host.task.engine.positions_computed == 53 for host in survivors)


def wedge(host) -> None:
    """From now on no batch of this host ever ends."""

    async def stuck(run, batch):
        await trio.sleep_forever()

    host.task.device.run_batch = stuck


@pytest.mark.parametrize("hop", range(HOPS))
async def test_a_server_whose_device_hangs_is_overtaken_though_its_process_answers(open_swarm, hop):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client)
        await session.step(ROW[:40])
        await stall_s(session, ROW, 40, 10)
        await serve(swarm, hop)
        wedge(hosts[hop])
        assert await stall_s(session, ROW, 50, 3) < 2.5
        assert client.finder.failures == []
        assert session.chain[hop].peer != hosts[hop].peer_id


async def test_a_server_that_is_only_busy_is_neither_overtaken_nor_blamed(open_swarm):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client)
        await session.step(ROW[:40])
        await stall_s(session, ROW, 40, 10)
        await serve(swarm, 1)
        run_batch = hosts[1].task.device.run_batch
        loaded_until = trio.current_time() + 4

        async def after_others(run, batch):
            # The device ends a turn every 300 ms, and for four seconds none of them is ours.
            while trio.current_time() < loaded_until:
                await trio.sleep(0.3)
                hosts[1].task.turns += 1
            return await run_batch(run, batch)

        hosts[1].task.device.run_batch = after_others
        assert await stall_s(session, ROW, 50, 3) > 4
        assert session.failovers == 0
        assert client.finder.failures == []


async def test_a_server_that_hangs_and_has_no_twin_is_waited_for(open_swarm):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client)
        await session.step(ROW[:40])
        await stall_s(session, ROW, 40, 10)
        swarm.network.stop(hosts[1].ip)

        async def wake() -> None:
            await trio.sleep(6)
            swarm.network.resume(hosts[1].ip)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wake)
            assert 5 < await stall_s(session, ROW, 50, 3) < 7
        assert session.failovers == 0
        assert all(host.task.engine.positions_computed == 53 for host in hosts)


async def test_a_server_that_hangs_is_overtaken_soon_after_a_twin_comes(open_swarm):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client)
        await session.step(ROW[:40])
        await stall_s(session, ROW, 40, 10)
        wedge(hosts[1])

        async def help_later() -> None:
            await trio.sleep(20)
            await serve(swarm, 1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(help_later)
            assert 20 < await stall_s(session, ROW, 50, 3) < 22.5
        assert session.failovers == 1


async def test_many_sessions_under_load_do_not_drive_each_other_from_server_to_server(open_swarm):
    async with open_swarm() as swarm:
        for hop in range(HOPS):
            for _ in range(2):
                await serve(swarm, hop, step_s=0.3)
        sessions = []

        async def use(client, seed: int) -> None:
            session = await client.session(BLOCKS)
            sessions.append(session)
            await session.step(ROW[: 100 + 20 * seed])
            await stall_s(session, ROW, 100 + 20 * seed, 10)

        async with trio.open_nursery() as nursery:
            for seed in range(6):
                nursery.start_soon(use, await swarm.client(), seed)
        assert sum(session.failovers for session in sessions) == 0


# Broken links.


@pytest.mark.parametrize("hop", range(HOPS - 1))
async def test_a_link_that_breaks_between_healthy_servers_is_bridged_and_nobody_is_blamed(open_swarm, hop):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client)
        await session.step(ROW[:40])
        swarm.network.partition(hosts[hop].ip, hosts[hop + 1].ip)
        swarm.network.disconnect(hosts[hop].ip, hosts[hop + 1].ip)
        assert await stall_s(session, ROW, 40, 10) < 0.5
        assert (session.failovers, client.finder.failures) == (0, [])
        assert all(host.task.engine.positions_computed == 50 for host in hosts)


async def test_a_link_that_swallows_what_it_is_given_is_bridged_in_seconds(open_swarm):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client)
        await session.step(ROW[:40])
        await stall_s(session, ROW, 40, 10)
        swarm.network.partition(hosts[1].ip, hosts[2].ip)
        assert await stall_s(session, ROW, 50, 10) < 2.5
        assert (session.failovers, client.finder.failures) == (0, [])
        assert all(host.task.engine.positions_computed == 60 for host in hosts)


async def test_a_bridge_carries_a_prompt_and_forks_too(open_swarm):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client, max_rows=3)
        swarm.network.partition(hosts[1].ip, hosts[2].ip)
        swarm.network.disconnect(hosts[1].ip, hosts[2].ip)
        await prefill(session)
        await session.step(ROW[39:40], start=39)
        asked = await forks(session)
        assert all(host.task.engine.positions_computed == 341 + asked for host in hosts)


async def test_a_bridge_ends_when_the_link_can_be_had_again(open_swarm):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client)
        await session.step(ROW[:40])
        swarm.network.partition(hosts[1].ip, hosts[2].ip)
        swarm.network.disconnect(hosts[1].ip, hosts[2].ip)
        bridged = await stall_s(session, ROW, 41 - 1, 5)
        swarm.network.heal(hosts[1].ip, hosts[2].ip)
        await trio.sleep(15)
        assert await stall_s(session, ROW, 45, 5) == pytest.approx(HOPS * 0.015 + 0.005, abs=0.001)
        assert bridged > HOPS * 0.015 + 0.01
        assert all(host.task.engine.positions_computed == 50 for host in hosts)


async def test_a_bridge_ends_when_another_server_has_the_blocks_behind_it(open_swarm):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client)
        await session.step(ROW[:40])
        swarm.network.partition(hosts[1].ip, hosts[2].ip)
        swarm.network.disconnect(hosts[1].ip, hosts[2].ip)
        await stall_s(session, ROW, 40, 5)
        twin = await serve(swarm, 2)
        await trio.sleep(15)
        assert await stall_s(session, ROW, 45, 5) == pytest.approx(HOPS * 0.015 + 0.005, abs=0.001)
        assert session.chain[2].peer == twin.peer_id
        assert client.finder.failures == []


async def test_a_hop_that_dies_at_either_end_of_a_bridge_is_replaced(open_swarm):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client)
        await session.step(ROW[:40])
        swarm.network.partition(hosts[1].ip, hosts[2].ip)
        swarm.network.disconnect(hosts[1].ip, hosts[2].ip)
        await stall_s(session, ROW, 40, 3)
        for hop in (2, 1):
            await serve(swarm, hop)
            swarm.kill(hosts[hop])
            await stall_s(session, ROW, 43 + 3 * (2 - hop), 3)
        assert all(hosts[hop].task.engine.positions_computed == 49 for hop in (0, 3))


async def test_a_server_that_neither_its_neighbour_nor_the_client_reaches_is_replaced(open_swarm):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client)
        await session.step(ROW[:40])
        await stall_s(session, ROW, 40, 5)
        twin = await serve(swarm, 2)
        for ip in (hosts[1].ip, client.ip):
            swarm.network.partition(hosts[2].ip, ip)
        assert await stall_s(session, ROW, 45, 5) < 3
        assert session.chain[2].peer == twin.peer_id


# No other peer.


async def test_survivors_keep_their_kv_until_the_missing_blocks_have_a_server(open_swarm):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client, patience=Patience(missing_s=1))
        await session.step(ROW[:40])
        swarm.kill(hosts[1])
        swarm.kill(hosts[3])
        with pytest.raises(NoChain, match=r"3:6, 9:12") as caught:
            await session.step(ROW[40:41])
        assert caught.value.missing == ((3, 6), (9, 12))
        await trio.sleep(60)
        await serve(swarm, 1)
        await serve(swarm, 3)
        assert await stall_s(session, ROW, 40, 5) < 1
        # What was given up had been run there already.
        assert all(hosts[hop].task.engine.positions_computed == 40 + 1 + 5 for hop in (0, 2))


async def test_a_session_resumes_though_its_survivors_have_long_forgotten_it(open_swarm):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client, patience=Patience(missing_s=1))
        await session.step(ROW[:40])
        swarm.kill(hosts[1])
        with pytest.raises(NoChain):
            await session.step(ROW[40:41])
        await trio.sleep(350)
        assert all(host.server.sessions == 0 for host in hosts)
        await serve(swarm, 1)
        await stall_s(session, ROW, 40, 5)


@pytest.mark.parametrize("given_up", ["a fork", "a rollback"])
async def test_what_was_given_up_and_cannot_be_taken_back_does_not_haunt_the_session(open_swarm, given_up):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client, max_rows=2, patience=Patience(missing_s=1))
        await session.step(ROW[:40])
        await session.step(BRANCH[:5], row=1)
        swarm.kill(hosts[2])
        # Long enough that the row's next position would still fit behind it, where it ran.
        what = {"start": 10, "ops": [Fork(0, 1, 10)]} if given_up == "a fork" else {"start": 2}
        with pytest.raises(NoChain):
            await session.step(BRANCH[5:9], row=1, **what)
        twin = await serve(swarm, 2)
        result = await session.step(BRANCH[5:6], row=1, want="all")
        assert torch.equal(result, expected(BRANCH[:6])[5:])
        await stall_s(session, ROW, 40, 3)
        # Nor does it cost the survivors their KV when something is given up that can be taken back.
        reopened = session.reopened
        swarm.kill(twin)
        with pytest.raises(NoChain):
            await session.step(ROW[43:44])
        await serve(swarm, 2)
        await stall_s(session, ROW, 43, 3)
        assert session.reopened == reopened


async def test_an_idle_session_that_was_evicted_asks_for_no_memory_until_it_is_used_again(open_swarm):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client)
        await session.step(ROW[:40])
        await trio.sleep(350)
        assert all(host.server.sessions == 0 for host in hosts)
        await stall_s(session, ROW, 40, 3)
        assert client.finder.failures == []


async def test_a_connection_that_breaks_under_a_healthy_server_ends_no_session(open_swarm):
    async with open_swarm() as swarm:
        client = await swarm.client()
        hosts, session = await open_chain(swarm, client)
        await session.step(ROW[:40])
        await serve(swarm, 1)
        swarm.network.disconnect(client.ip, hosts[1].ip)
        assert await stall_s(session, ROW, 40, 3) < 0.5
