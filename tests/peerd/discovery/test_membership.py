"""How soon clients notice that servers come, leave, crash, restart and wake."""

from __future__ import annotations

import pytest
import torch
import trio
import trio.testing

from peerd.client.finding.finder import Patience
from peerd.routing.directory.announcer import TTL_S
from peerd.routing.failures.track_record import FIRST_AVOIDANCE_S
from tests.fakes.presence_fixture import WIDTH, Client, Serving, World, open_world, seconds_until


def step() -> torch.Tensor:
    return torch.ones(1, WIDTH)


async def chooses(client: Client, *servers: Serving) -> bool:
    """Whether the client, asked often, would use each of these peers and no other."""
    found = {await client.chosen() for _ in range(12)}
    return found == {server.peer_id for server in servers}


# Leaving.


async def test_a_server_that_leaves_in_good_order_is_never_chosen_again() -> None:
    async with open_world() as world:
        stays, leaves = await world.serve(2), await world.serve(3)
        known, met, new = [await world.client(number) for number in (10, 11, 12)]
        await seconds_until(lambda: chooses(known, stays, leaves))
        # One client has a session with it, one only a view of the swarm, one has asked nothing.
        session = await met.session()
        await session.step(step())
        await seconds_until(lambda: chooses(met, stays, leaves))
        await met.connections.connect(leaves.peer_id, [world.address(3)])
        await world.stop(leaves)
        assert await seconds_until(lambda: chooses(met, stays), every_s=0.01) < 0.1
        assert await chooses(new, stays)
        # Its view may be a moment old; a session that asks a server which has left is sent on at once.
        assert await seconds_until(lambda: chooses(known, stays)) < 5
        await (await known.session()).step(step())


# Crashing.


@pytest.mark.parametrize("knows_it", [True, False])
async def test_a_crashed_server_is_no_longer_chosen_after_a_minute(knows_it: bool) -> None:
    async with open_world() as world:
        stays, crashes = await world.serve(2), await world.serve(3)
        client = await world.client(10)
        if knows_it:
            await seconds_until(lambda: chooses(client, stays, crashes))
        await world.crash(crashes)
        assert await seconds_until(lambda: chooses(client, stays)) <= TTL_S


async def test_a_connected_peer_drops_a_crashed_one_at_once() -> None:
    async with open_world() as world:
        stays, crashes = await world.serve(2), await world.serve(3)
        client = await world.client(10)
        await seconds_until(lambda: chooses(client, stays, crashes))
        await client.connections.connect(crashes.peer_id, [world.address(3)])
        await trio.sleep(1)
        world.network.kill(world.host(3))
        await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        before = trio.current_time()
        assert await chooses(client, stays)
        assert trio.current_time() == before


# Coming back.


async def test_a_broken_connection_to_a_healthy_peer_costs_a_moment_and_no_blame() -> None:
    async with open_world() as world:
        server = await world.serve(2)
        client = await world.client(10)
        await seconds_until(lambda: chooses(client, server))
        await client.connections.connect(server.peer_id, [world.address(2)])
        await trio.sleep(1)
        world.network.disconnect(world.host(2), world.host(10))
        assert await seconds_until(lambda: chooses(client, server), every_s=0.02) < 0.3
        assert client.discovery.track_record.failed(server.peer_id) == FIRST_AVOIDANCE_S


async def test_a_peer_that_fails_at_its_work_though_it_answers_waits_longer_each_time() -> None:
    async with open_world() as world:
        server = await world.serve(2)
        client = await world.client(10)
        await seconds_until(lambda: chooses(client, server))
        waits = []
        for _ in range(3):
            client.finder.failed(server.peer_id)
            waits.append(await seconds_until(lambda: chooses(client, server), every_s=0.5))
        assert waits == pytest.approx([5, 10, 20], abs=1)


async def test_a_peer_that_cannot_be_reached_is_not_tried_with_sessions() -> None:
    """Its announcements are still about; it answers no proof, so it does not come back by time."""
    async with open_world() as world:
        stays, gone = await world.serve(2), await world.serve(3)
        client = await world.client(10)
        await seconds_until(lambda: chooses(client, stays, gone))
        await client.connections.connect(gone.peer_id, [world.address(3)])
        # A wall between these two alone: it goes on announcing.
        world.network.partition(world.host(3), world.host(10))
        assert await seconds_until(lambda: chooses(client, stays), every_s=0.5) < 10
        for _ in range(24):
            assert await client.chosen() == stays.peer_id
            await trio.sleep(5)
        world.network.heal(world.host(3), world.host(10))
        # Announced anew every 20 s, asked at once.
        assert await seconds_until(lambda: chooses(client, stays, gone)) < TTL_S / 3 + 6


async def test_a_peer_that_restarts_is_used_again_as_soon_as_it_is_announced() -> None:
    async with open_world() as world:
        first = await world.serve(2)
        client = await world.client(10)
        await seconds_until(lambda: chooses(client, first))
        # It has a long record of failures.
        for _ in range(3):
            client.finder.failed(first.peer_id)
            await trio.sleep(21)
        client.finder.failed(first.peer_id)
        assert client.discovery.track_record.failed(first.peer_id) > 30
        await client.connections.connect(first.peer_id, [world.address(2)])
        await world.crash(first)
        # It was asked after 0, 5, 15 and 35 s, and would be after 75.
        await trio.sleep(40)
        second = await world.serve(2)
        assert await seconds_until(lambda: chooses(client, second)) < 7


# Coming.


async def test_a_new_server_is_used_by_new_sessions_within_five_seconds() -> None:
    async with open_world() as world:
        old = await world.serve(2)
        client = await world.client(10)
        session = await client.session()
        await session.step(step())
        # Whenever the client looked last.
        for number, phase_s in ((3, 0.0), (4, 1.3), (5, 2.9), (6, 4.6)):
            await seconds_until(lambda: chooses(client, old))
            await trio.sleep(phase_s)
            new = await world.serve(number)

            async def is_used(new: Serving = new) -> bool:
                return new.peer_id in {await client.chosen() for _ in range(8)}

            assert await seconds_until(is_used) < 5
            await world.stop(new)
            await trio.sleep(10)


async def test_a_session_that_waits_for_a_server_has_one_within_five_seconds() -> None:
    async with open_world() as world:
        client = await world.client(10)
        waiting = await client.session(Patience(missing_s=60))
        found: list[float] = []

        async def run() -> None:
            await waiting.step(step())
            found.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.sleep(20)
            assert not found
            server = await world.serve(2)
            announced_at = trio.current_time()
        assert found[0] - announced_at < 5
        assert waiting.chain[0].peer == server.peer_id


# Sleeping.


def sleep_through(world: World, number: int, slept_s: float) -> None:
    """A suspended machine: no clock but the wall's goes on, others give it up, and what it announced ends.

    In this world all machines share the wall's clock, so that the others take themselves for sleepers too.
    """
    world.slept_s += slept_s
    world.network.give_up(world.host(number))


@pytest.mark.parametrize("slept_s", [60.0, 7200.0])
async def test_a_server_that_wakes_is_used_again_within_seconds(slept_s: float) -> None:
    async with open_world() as world:
        server = await world.serve(2)
        client, stranger = await world.client(10), await world.client(11)
        await (await client.session()).step(step())
        await trio.sleep(30)
        sleep_through(world, 2, slept_s)
        assert await client.chosen() is None
        assert await seconds_until(lambda: chooses(client, server)) < 5
        assert await chooses(stranger, server)
        await (await stranger.session()).step(step())


async def test_a_session_of_a_client_that_wakes_goes_on_within_seconds() -> None:
    async with open_world() as world:
        server = await world.serve(2)
        client = await world.client(10)
        session = await client.session()
        before = await session.step(step())
        await trio.sleep(30)
        sleep_through(world, 10, 7200)
        start = trio.current_time()
        after = await session.step(step())
        assert trio.current_time() - start < 6
        assert session.chain[0].peer == server.peer_id
        # The second position: it has the first one behind it.
        undisturbed = await client.session()
        assert torch.equal(before, await undisturbed.step(step()))
        assert torch.equal(after, await undisturbed.step(step()))


# Partitions.


async def test_after_a_partition_both_sides_find_each_other_again() -> None:
    async with open_world() as world:
        near, far = await world.serve(2), await world.serve(3)
        client = await world.client(10)
        await seconds_until(lambda: chooses(client, near, far))
        session = await client.session()
        await session.step(step())
        world.cut_off(3)
        await session.step(step())
        await trio.sleep(300)
        assert await chooses(client, near)
        assert far.peer_id not in {contact.peer_id for contact in near.discovery.dht.contacts}
        world.join_up(3)
        # A peer without connections looks for the others at least once a minute, and every peer announces every 20 s.
        assert await seconds_until(lambda: chooses(client, near, far), within_s=200) < 60 + 20 + 10
        await session.step(step())

        async def knows() -> bool:
            return far.peer_id in {contact.peer_id for contact in near.discovery.dht.contacts}

        assert await seconds_until(knows, every_s=1) < 120


async def test_a_session_whose_only_server_was_cut_off_resumes_when_it_is_back() -> None:
    async with open_world() as world:
        server = await world.serve(2)
        client = await world.client(10)
        session = await client.session(Patience(missing_s=120))
        await session.step(step())
        world.network.partition(world.host(2), world.host(10))

        async def heal() -> None:
            await trio.sleep(30)
            world.network.heal(world.host(2), world.host(10))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(heal)
            await session.step(step())
        assert trio.current_time() < 90
        assert session.chain[0].peer == server.peer_id


# Ghosts.


async def test_a_partition_that_heals_brings_no_ghost_back() -> None:
    """The far side holds records of a peer that died there meanwhile, and of one that left the near side."""
    async with open_world() as world:
        stays, leaves, keeps, dies = [await world.serve(number) for number in (2, 3, 4, 5)]
        client = await world.client(10)
        await seconds_until(lambda: chooses(client, stays, leaves, keeps, dies))
        for near in (1, 2, 3, 10):
            for far in (4, 5):
                world.network.partition(world.host(near), world.host(far))
        # The far side cannot hear that one leaves, nor the near side that one dies.
        await world.stop(leaves)
        await world.crash(dies)
        healed_at = trio.current_time() + 5
        await trio.sleep(5)
        for near in (1, 2, 3, 10):
            for far in (4, 5):
                world.network.heal(world.host(near), world.host(far))
        seen = set()
        while trio.current_time() < healed_at + 2 * TTL_S:
            chosen = await client.chosen()
            seen.add(chosen)
            assert chosen != leaves.peer_id
            assert chosen != dies.peer_id or trio.current_time() < healed_at + TTL_S
            await trio.sleep(2)
        assert {stays.peer_id, keeps.peer_id} <= seen
