"""How connections end: by failures of the network, by choice, and for want of room."""

import threading
from contextlib import AsyncExitStack, suppress

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from peerd.net.connection.peer_connection import IDLE
from peerd.net.connections import open_connections
from peerd.net.limits.gate import ConnectionLimits
from peerd.net.live_connections import IDLE_S, MIN_DIALLED, SPARED_S
from peerd.protocol.connection.events import StreamOpened
from peerd.protocol.connection.frames import Priority
from peerd.protocol.errors import (
    ConnectFailed,
    ConnectionLost,
)
from peerd.protocol.identity import Identity
from tests.fakes.connected_peers import IDENTITIES, Rogue, Swarm, address_of, ask, echo, open_connected, sink


@pytest.mark.parametrize("number", [0, 1])
async def test_a_peer_that_restarts_is_taken_back_at_once(number):
    async with open_connected() as swarm:
        stays = await swarm.start(1 - number)
        async with AsyncExitStack() as life:
            first = await Swarm(swarm.network, life).start(number)
            await first.connect(stays.peer_id, [address_of(1 - number)])
            # Its host vanishes without a word, and comes back with the same identity.
            swarm.network.partition("10.0.0.0", "10.0.0.1")
        swarm.network.heal("10.0.0.0", "10.0.0.1")
        second = await swarm.start(number, listen=[])
        with trio.fail_after(4):
            assert await ask(second, 1 - number) == b"hi"
        assert len(stays.live) == 1


async def test_peers_that_come_and_go_write_no_log(caplog):
    """A peer that connects a thousand times would fill the disk."""
    caplog.set_level("INFO")
    async with open_connected() as swarm:
        stays = await swarm.start(0)
        for _ in range(5):
            async with AsyncExitStack() as life:
                visitor = await Swarm(swarm.network, life).start(1)
                await visitor.connect(stays.peer_id, [address_of(0)])
            with trio.fail_after(5):
                while stays.live:
                    await trio.sleep(0.1)
    # The visitor's own lines name the other end.
    said = [record.getMessage() for record in caplog.records]
    assert said
    assert not any(str(IDENTITIES[1].peer_id) in message for message in said)


def _cut(network, how):
    """Make a black hole of the way there, the way back, or both, as seen from peer 0."""
    if how in ("there", "both"):
        network.lose("10.0.0.0", "10.0.0.1")
    if how in ("back", "both"):
        network.lose("10.0.0.1", "10.0.0.0")


@pytest.mark.parametrize("latency_s", [0.001, 0.1])
@pytest.mark.parametrize("how", ["there", "back", "both"])
async def test_both_sides_find_a_black_hole_in_three_seconds_and_tell_all_waiters(how, latency_s):
    async with open_connected(latency_s=latency_s) as swarm:
        one, other = await swarm.pair({"/echo/1": echo, "/sink/1": sink})
        lost = []
        one.on_lost.append(lambda connection: lost.append((connection.peer_id, trio.current_time())))
        other.on_lost.append(lambda connection: lost.append((connection.peer_id, trio.current_time())))
        stream = await one.open_stream(other.peer_id, "/sink/1", addresses=[address_of(1)])
        await trio.sleep(1)
        _cut(swarm.network, how)
        start = trio.current_time()
        with pytest.raises(ConnectionLost, match="nothing we send arrives"):
            await stream.receive()
        await trio.sleep(3)
        assert {peer for peer, _ in lost} == {one.peer_id, other.peer_id}
        assert all(1.5 < at - start < 3.6 + 4 * latency_s for _, at in lost)
        assert not one.live
        assert not other.live


@pytest.mark.parametrize("how", ["there", "back", "both"])
async def test_an_idle_connection_into_a_black_hole_ends_in_eight_seconds(how):
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        connection = await one.connect(other.peer_id, [address_of(1)])
        await trio.sleep(20)
        _cut(swarm.network, how)
        start = trio.current_time()
        await connection.wait_lost()
        await trio.sleep(2)
        assert trio.current_time() - start < 10
        assert not other.live


async def test_a_writer_that_is_stuck_in_a_black_hole_hides_nothing():
    async with open_connected(bytes_a_second=10_000_000.0) as swarm:
        one, other = await swarm.pair({"/drain/1": _drain})
        stream = await one.open_stream(other.peer_id, "/drain/1", addresses=[address_of(1)])
        sending = trio.Event()

        async def send():
            with suppress(ConnectionLost):
                while True:
                    await stream.send({}, [bytes(1 << 20)])
                    sending.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await sending.wait()
            _cut(swarm.network, "there")
            start = trio.current_time()
        assert trio.current_time() - start < 4
        assert not one.live


async def _drain(stream):
    with suppress(trio.EndOfChannel):
        while True:
            await stream.receive(1 << 26)


@pytest.mark.parametrize("stalls_s", [2, 5, 9])
async def test_a_process_that_stands_still_for_seconds_keeps_its_connections(stalls_s):
    """It loads a model, say: its system acknowledges what arrives, and says so."""
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        stream = await one.open_stream(other.peer_id, "/echo/1", addresses=[address_of(1)])
        for _ in range(3):
            swarm.network.stop("10.0.0.1")
            await stream.send({}, [bytes(1 << 20)])
            await trio.sleep(stalls_s)
            swarm.network.resume("10.0.0.1")
            assert len((await stream.receive(1 << 20)).body) == 1 << 20
        assert stream.connection.lost is None


async def test_a_process_that_hangs_is_given_up_in_ten_seconds():
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        stream = await one.open_stream(other.peer_id, "/echo/1", addresses=[address_of(1)])
        await trio.sleep(1)
        swarm.network.stop("10.0.0.1")
        start = trio.current_time()
        with pytest.raises(ConnectionLost, match="silent for 1"):
            await stream.receive()
        assert 9 < trio.current_time() - start < 12


@pytest.mark.parametrize("bytes_a_second", [2_000.0, 50_000.0])
async def test_bulk_on_a_slow_line_keeps_the_connection_alive_whichever_way_it_goes(bytes_a_second):
    async with open_connected(bytes_a_second=bytes_a_second) as swarm:
        one, other = await swarm.pair({"/drain/1": _drain})
        for sender, receiver in ((one, other), (other, one)):
            number = 1 if receiver is other else 0
            stream = await sender.open_stream(receiver.peer_id, "/drain/1", addresses=[address_of(number)])
            await stream.send({}, [bytes(1 << 20)], priority=Priority.BULK)
        await trio.sleep(300)
        assert stream.connection.lost is None
        assert len(one.live) == len(other.live) == 1


async def test_a_partition_that_heals_lets_peers_connect_again_at_once():
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        stream = await one.open_stream(other.peer_id, "/echo/1", addresses=[address_of(1)])
        _cut(swarm.network, "both")
        await stream.connection.wait_lost()
        swarm.network.heal("10.0.0.0", "10.0.0.1")
        with trio.fail_after(1):
            assert await ask(one, 1) == b"hi"


async def test_a_peer_that_talks_and_never_reads_is_shown_out_in_a_bounded_time():
    async with open_connected() as swarm:
        one = await swarm.start(0)
        rogue = Rogue(swarm)
        await rogue.shake()
        hello = (await rogue.until(StreamOpened)).stream
        rogue.core.streams.send(hello, {"type": "hello", "agent": "rogue", "time_us": 0}, [], Priority.CONTROL)
        rogue.core.streams.finish(hello)
        await rogue.flush()
        await trio.sleep(1)
        ends = []
        one.on_lost.append(lambda connection: ends.append(str(connection.lost)))
        start = trio.current_time()
        while not ends:
            # Frames that want an answer, and none is ever taken from the channel.
            stream = rogue.core.streams.open("/echo/1", Priority.BULK)
            rogue.core.streams.reset(stream, "cancelled")
            await rogue.flush()
            await trio.sleep(0.5)
        assert 55 < trio.current_time() - start < 80
        assert "talks but does not read" in ends[0]


async def test_a_killed_peer_is_lost_at_once():
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        stream = await one.open_stream(other.peer_id, "/echo/1", addresses=[address_of(1)])
        await trio.sleep(1)
        start = trio.current_time()
        swarm.network.kill("10.0.0.1")
        with pytest.raises(ConnectionLost):
            await stream.receive()
        assert trio.current_time() == start
        assert isinstance(await stream.connection.wait_lost(), ConnectionLost)
        with pytest.raises(ConnectFailed):
            await one.connect(other.peer_id, [address_of(1)])


async def test_the_side_that_closes_gives_the_reason():
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        connection = await one.connect(other.peer_id, [address_of(1)])
        await connection.wait_hello()
        other.live[one.peer_id].close("draining", "this peer is leaving")
        assert "this peer is leaving" in str(await connection.wait_lost())


class Meeting:
    """One peer that has dialled `count` others, which wait for it."""

    def __init__(self, swarm, handlers=None):
        self.swarm, self.handlers = swarm, handlers
        self.others = [Identity.from_seed(bytes([n, 1]) * 16) for n in range(MIN_DIALLED + 4)]

    async def start(self, **arguments):
        self.peers = [
            await self.swarm.start(20 + n, self.handlers, identity=one, **arguments)
            for n, one in enumerate(self.others)
        ]
        self.own = await self.swarm.start(0, listen=[])
        for number, other in enumerate(self.others):
            await self.own.connect(other.peer_id, [address_of(20 + number)])
            await trio.sleep(1)


async def test_the_side_that_dialled_closes_all_but_some_unused_connections():
    async with open_connected() as swarm:
        meeting = Meeting(swarm, {"/sink/1": sink})
        await meeting.start()
        used, measured = meeting.others[0], meeting.others[1]
        stream = await meeting.own.open_stream(used.peer_id, "/sink/1")
        for _ in range(10):
            await trio.sleep(IDLE_S / 8)
            await meeting.own.live[measured.peer_id].measure()
            assert len(meeting.own.live) == len(meeting.others) or trio.current_time() > IDLE_S
        await trio.sleep(IDLE_S / 2)
        left = [one.peer_id for one in meeting.others if one.peer_id not in meeting.own.live]
        # Those that were idle for longest.
        assert left == [one.peer_id for one in meeting.others[2:6]]
        assert [other.live for other in meeting.peers[2:6]] == [{}] * 4
        await stream.aclose()


async def test_the_side_that_was_dialled_closes_nothing_and_gets_the_reason():
    async with open_connected() as swarm:
        meeting = Meeting(swarm)
        told = []
        await meeting.start()
        for other in meeting.peers:
            other.on_lost.append(lambda connection: told.append((connection.farewell, connection.closed_here)))
        await trio.sleep(3 * IDLE_S)
        assert told == [(IDLE, False)] * 4


async def test_a_newcomer_gets_the_place_of_an_idle_peer_when_all_are_taken():
    async with open_connected() as swarm:
        own = await swarm.start(0, {"/sink/1": sink}, room=ConnectionLimits(settled=2, unproven=2))
        peers = [await swarm.start(number, listen=[]) for number in (1, 2, 3, 4)]
        for peer in peers[:2]:
            await peer.connect(own.peer_id, [address_of(0)])
        stream = peers[0].live[own.peer_id].open_stream("/sink/1")
        # No connection was idle for long.
        with pytest.raises(ConnectFailed):
            await peers[2].connect(own.peer_id, [address_of(0)])
        await trio.sleep(SPARED_S)
        await peers[2].connect(own.peer_id, [address_of(0)])
        await wait_all_tasks_blocked()
        assert list(own.live) == [peers[0].peer_id, peers[2].peer_id]
        await trio.sleep(0.1)
        assert peers[1].live == {}
        await stream.aclose()


async def test_observers_hear_of_peers_as_they_come_and_go():
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        heard = []
        one.on_connected.append(lambda connection: heard.append(("connected", connection.peer_id)))
        one.on_lost.append(lambda connection: heard.append(("lost", connection.peer_id)))
        await other.connect(one.peer_id, [address_of(0)])
        await trio.sleep(1)
        swarm.network.disconnect("10.0.0.0", "10.0.0.1")
        await trio.sleep(1)
        assert heard == [("connected", other.peer_id), ("lost", other.peer_id)]


async def test_an_exception_while_others_are_told_of_the_end_leaves_no_task_waiting():
    async with open_connected() as swarm:
        one, other = await swarm.pair({"/echo/1": echo, "/sink/1": sink})
        connection = await one.connect(other.peer_id, [address_of(1)])
        stream = connection.open_stream("/sink/1")

        def fail(_connection):
            raise ValueError("a bug in an observer")

        connection._on_lost = fail
        with pytest.raises(ValueError, match="a bug in an observer"):
            connection.close()
        with trio.fail_after(1):
            assert isinstance(await connection.wait_lost(), ConnectionLost)
            with pytest.raises(ConnectionLost):
                await stream.receive()
            while other.live:
                await trio.sleep(0.01)


async def test_a_dial_that_is_cancelled_in_the_handshake_holds_no_memory(monkeypatch):
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        opened = []
        open_buffers = one.budget.open

        def open_noted(owner=""):
            opened.append(open_buffers(owner))
            return opened[-1]

        monkeypatch.setattr(one.budget, "open", open_noted)
        swarm.network.stop("10.0.0.1")
        with trio.move_on_after(2) as waiting:
            await one.connect(other.peer_id, [address_of(1)])
        assert waiting.cancelled_caught
        await trio.sleep(1)
        assert [buffers.is_closed for buffers in opened] == [True]


async def test_cancelling_closes_everything_within_a_second():
    async with open_connected(bytes_a_second=1000.0) as swarm:
        other = await swarm.start(1, {"/sink/1": sink})
        with trio.CancelScope() as scope:
            async with open_connections(
                IDENTITIES[0], transport=swarm.network.transport("10.0.0.0"), handlers={}
            ) as one:
                stream = await one.open_stream(other.peer_id, "/sink/1", addresses=[address_of(1)])
                await stream.send({}, [bytes(1 << 20)])
                await trio.sleep(30)
                start = trio.current_time()
                scope.cancel()
                await trio.sleep_forever()
        assert trio.current_time() - start < 1
        await trio.sleep(2)
        assert not other.live


def test_an_opening_that_is_cancelled_before_it_begins_is_not_held_up():
    """As a daemon is that is told to stop while it starts. In a thread, for no time-out gets past a shield."""

    async def open_cancelled() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            async with open_connected() as swarm:
                await swarm.start(0)

    thread = threading.Thread(target=trio.run, args=(open_cancelled,), daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
