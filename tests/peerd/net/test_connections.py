"""Connections between peers on a network in memory: which peers are connected."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import (
    ConnectFailed,
    InvalidRequest,
    WrongPeer,
)
from tests.fakes.connected_peers import IDENTITIES, address_of, ask, open_connected


@pytest.mark.parametrize(("dialler", "listener"), [(0, 1), (1, 0)])
async def test_a_stream_to_a_peer_carries_messages_both_ways(dialler, listener):
    async with open_connected() as swarm:
        peers = await swarm.pair()
        assert await ask(peers[dialler], listener) == b"hi"
        assert list(peers[dialler].live) == [peers[listener].peer_id]
        assert list(peers[listener].live) == [peers[dialler].peer_id]


async def test_both_sides_say_hello():
    async with open_connected() as swarm:
        one, other = await swarm.start(0, agent="test/1", now=lambda: 5.0), await swarm.start(1, roles=["serve"])
        other.present_as(listen_as=[address_of(1)])
        connection = await one.connect(other.peer_id, [address_of(1)])
        hello = await connection.wait_hello()
        assert (hello.roles, hello.multiaddrs, hello.observed_ip) == (("serve",), (address_of(1),), "10.0.0.0")
        there = await other.live[one.peer_id].wait_hello()
        assert (there.agent, there.time_us, there.protocols) == ("test/1", 5_000_000, ("/echo/1",))
        assert connection.rtt_s == pytest.approx(0.02)


async def test_a_peer_is_dialled_once_however_many_ask_at_the_same_time():
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        found = []

        async def connect():
            found.append(await one.connect(other.peer_id, [address_of(1)]))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(connect)
        assert len(set(found)) == 1
        assert repr(swarm.network) == "<MemoryNetwork channels=2 listeners=2>"


async def test_a_caller_who_gives_up_does_not_spoil_the_dial_for_another():
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(0.001) as impatient:
                await one.connect(other.peer_id, [address_of(1)])
            nursery.start_soon(one.connect, other.peer_id, [address_of(1)])
        assert impatient.cancelled_caught
        assert len(one.live) == 1


async def test_a_dial_that_nobody_waits_for_any_more_ends():
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        swarm.network.partition("10.0.0.0", "10.0.0.1")
        with trio.move_on_after(1):
            await one.connect(other.peer_id, [address_of(1)])
        await wait_all_tasks_blocked()
        assert "dials=0" in repr(one)


@pytest.mark.parametrize("offset_s", [0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06])
async def test_simultaneous_dials_settle_on_one_connection_and_no_stream_is_lost(offset_s):
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        answers = []

        async def ask_often(connections, number, delay_s):
            await trio.sleep(delay_s)
            for _ in range(20):
                answers.append(await ask(connections, number))

        for first, second in ((0, offset_s), (offset_s, 0)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask_often, one, 1, first)
                nursery.start_soon(ask_often, other, 0, second)
            await trio.sleep(3)
            assert len(one.live) == len(other.live) == 1
            # Two ends of one channel: the other connection is gone on both sides.
            assert repr(swarm.network) == "<MemoryNetwork channels=2 listeners=2>"
            swarm.network.disconnect("10.0.0.0", "10.0.0.1")
            await trio.sleep(1)
        assert answers == [b"hi"] * 80


async def test_a_peer_behind_a_wall_is_reached_over_the_connection_that_it_made():
    async with open_connected() as swarm:
        one = await swarm.start(0)
        client = await swarm.start(1, listen=[])
        await client.connect(one.peer_id, [address_of(0)])
        await wait_all_tasks_blocked()
        assert await ask(one, 1) == b"hi"


async def test_an_inbound_connection_ends_a_dial_that_hangs():
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        swarm.network.partition("10.0.0.0", "10.9.9.9")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.connect, other.peer_id, [Multiaddr("ip4", "10.9.9.9", 1)])
            await other.connect(one.peer_id, [address_of(0)])
        assert trio.current_time() < 1
        assert len(one.live) == 1


async def test_the_next_address_is_tried_beside_one_that_does_not_answer():
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        swarm.network.partition("10.0.0.0", "10.9.9.9")
        start = trio.current_time()
        await one.connect(other.peer_id, [Multiaddr("ip4", "10.9.9.9", 1), address_of(1)])
        assert trio.current_time() - start < 0.5


async def test_when_no_address_works_every_reason_is_told():
    async with open_connected() as swarm:
        one = await swarm.start(0)
        swarm.network.partition("10.0.0.0", "10.9.9.9")
        nobody, silent = Multiaddr("ip4", "10.0.0.7", 1), Multiaddr("ip4", "10.9.9.9", 1)
        start = trio.current_time()
        with pytest.raises(ConnectFailed) as caught:
            await one.connect(IDENTITIES[7].peer_id, [nobody, silent])
        assert trio.current_time() - start < 7
        text = str(caught.value)
        assert "10.0.0.7:1 refused" in text
        assert "no answer within 6 s" in text


async def test_without_an_address_there_is_no_way():
    async with open_connected() as swarm:
        one = await swarm.start(0)
        with pytest.raises(ConnectFailed, match="no address"):
            await one.connect(IDENTITIES[7].peer_id, [])


async def test_finding_another_peer_at_the_address_is_told():
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        with pytest.raises(WrongPeer):
            await one.connect(IDENTITIES[5].peer_id, [address_of(1)])
        assert await ask(one, 1) == b"hi"
        assert len(other.live) == 1


async def test_any_peer_that_answers_is_taken_where_no_peer_was_named():
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        connection = await one.connect(None, [address_of(1)])
        assert connection.peer_id == other.peer_id
        assert await one.connect(None, [address_of(1)]) is connection


@pytest.mark.parametrize(("dialler", "listener"), [(0, 1), (1, 0)])
async def test_a_peer_that_was_found_twice_keeps_its_first_connection(dialler, listener):
    async with open_connected() as swarm:
        peers = await swarm.pair()
        first = await peers[dialler].connect(None, [address_of(listener)])
        assert await peers[dialler].connect(None, [address_of(listener)]) is first
        assert await ask(peers[listener], dialler) == b"hi"
        assert repr(swarm.network) == "<MemoryNetwork channels=2 listeners=2>"


async def test_a_peer_does_not_dial_itself():
    async with open_connected() as swarm:
        one = await swarm.start(0)
        with pytest.raises(InvalidRequest, match="itself"):
            await one.connect(one.peer_id, [address_of(0)])
        with pytest.raises(ConnectFailed, match="the peer is ourselves"):
            await one.connect(None, [address_of(0)])


async def test_streams_to_oneself_reach_ones_own_handlers_and_no_observer():
    async with open_connected() as swarm:
        one = await swarm.start(0, swarm_key=b"k" * 32)
        seen = []
        one.on_connected.append(seen.append)
        for _ in range(2):
            async with await one.open_stream(one.peer_id, "/echo/1") as stream:
                assert stream.peer == one.peer_id
                await stream.send({"type": "a"}, [memoryview(bytes(1 << 20))])
                assert len((await stream.receive(1 << 20)).body) == 1 << 20
                stream.finish()
        assert not one.live
        assert not seen


async def test_strangers_do_not_get_into_a_private_swarm():
    async with open_connected() as swarm:
        one, other = await swarm.start(0, swarm_key=b"k" * 32), await swarm.start(1, swarm_key=b"k" * 32)
        stranger = await swarm.start(2)
        assert await ask(one, 1) == b"hi"
        with pytest.raises(ConnectFailed):
            await stranger.connect(other.peer_id, [address_of(1)])
        assert list(other.live) == [one.peer_id]


@pytest.mark.parametrize("after_ms", range(5, 100, 10))
async def test_a_dial_that_is_cancelled_at_any_moment_leaves_nothing_behind(after_ms):
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        with trio.move_on_after(after_ms / 1000) as cancelled:
            await one.connect(other.peer_id, [address_of(1)])
        await trio.sleep(3)
        expected = 0 if cancelled.cancelled_caught else 1
        assert len(one.live) == len(other.live) == expected
        assert repr(swarm.network) == f"<MemoryNetwork channels={2 * expected} listeners=2>"
        assert await ask(one, 1) == b"hi"
