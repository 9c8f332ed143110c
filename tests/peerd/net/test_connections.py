"""Connections between peers on a network in memory: which peers are connected, and how connections end."""

import threading
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from peerd.net.connections import open_connections
from peerd.net.limits.gate import ConnectionLimits
from peerd.net.live_connections import IDLE_S, MIN_DIALLED, SPARED_S
from peerd.net.peer_connection import IDLE
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.connection import ConnectionMachine
from peerd.protocol.connection.events import GoneAway, StreamOpened
from peerd.protocol.connection.frames import Priority
from peerd.protocol.connection.hello import HELLO_PROTOCOL
from peerd.protocol.errors import (
    ConnectFailed,
    ConnectionLost,
    InvalidRequest,
    LocalProtocolError,
    NotServed,
    Overloaded,
    RemoteProtocolError,
    StreamReset,
    UnsupportedFeature,
    WrongPeer,
)
from peerd.protocol.identity import Identity
from peerd.testing.network import MemoryNetwork

LISTEN = Multiaddr.parse("/ip4/0.0.0.0/tcp/31330/ws")
# Sorted by PeerId: of two, the one with the smaller id chooses between connections.
IDENTITIES = sorted((Identity.from_seed(bytes([n]) * 32) for n in range(1, 9)), key=lambda one: one.peer_id)


def _address(number):
    return Multiaddr("ip4", f"10.0.0.{number}", 31330)


class Swarm:
    """Peers by number, each on its own host `10.0.0.<number>`."""

    def __init__(self, network, stack):
        self.network = network
        self.stack = stack

    async def start(self, number, handlers=None, **arguments):
        arguments.setdefault("listen", [LISTEN])
        return await self.stack.enter_async_context(
            open_connections(
                arguments.pop("identity", None) or IDENTITIES[number],
                transport=self.network.transport(f"10.0.0.{number}"),
                handlers=handlers or {"/echo/1": _echo},
                **arguments,
            )
        )

    async def pair(self, handlers=None):
        return await self.start(0, handlers), await self.start(1, handlers)


@asynccontextmanager
async def _swarm(latency_s=0.01, **arguments):
    async with AsyncExitStack() as stack:
        yield Swarm(MemoryNetwork(latency_s=latency_s, **arguments), stack)


async def _echo(stream):
    while True:
        try:
            message = await stream.receive(1 << 26)
        except trio.EndOfChannel:
            return
        await stream.send(message.header, [message.body])


async def _sink(_stream):
    await trio.sleep_forever()


async def _ask(connections, number, body=b"hi"):
    stream = await connections.open_stream(IDENTITIES[number].peer_id, "/echo/1", addresses=[_address(number)])
    async with stream:
        await stream.send({"n": 1}, [body])
        return bytes((await stream.receive(2**20)).body)


# Connecting.


@pytest.mark.parametrize(("dialler", "listener"), [(0, 1), (1, 0)])
async def test_a_stream_to_a_peer_carries_messages_both_ways(dialler, listener):
    async with _swarm() as swarm:
        peers = await swarm.pair()
        assert await _ask(peers[dialler], listener) == b"hi"
        assert list(peers[dialler].live) == [peers[listener].peer_id]
        assert list(peers[listener].live) == [peers[dialler].peer_id]


async def test_both_sides_say_hello():
    async with _swarm() as swarm:
        one, other = await swarm.start(0, agent="test/1", now=lambda: 5.0), await swarm.start(1, roles=["serve"])
        other.present_as(listen_as=[_address(1)])
        connection = await one.connect(other.peer_id, [_address(1)])
        hello = await connection.wait_hello()
        assert (hello.roles, hello.multiaddrs, hello.observed_ip) == (("serve",), (_address(1),), "10.0.0.0")
        there = await other.live[one.peer_id].wait_hello()
        assert (there.agent, there.time_us, there.protocols) == ("test/1", 5_000_000, ("/echo/1",))
        assert connection.rtt_s == pytest.approx(0.02)


async def test_a_peer_is_dialled_once_however_many_ask_at_the_same_time():
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        found = []

        async def connect():
            found.append(await one.connect(other.peer_id, [_address(1)]))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(connect)
        assert len(set(found)) == 1
        assert repr(swarm.network) == "<MemoryNetwork channels=2 listeners=2>"


async def test_a_caller_who_gives_up_does_not_spoil_the_dial_for_another():
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(0.001) as impatient:
                await one.connect(other.peer_id, [_address(1)])
            nursery.start_soon(one.connect, other.peer_id, [_address(1)])
        assert impatient.cancelled_caught
        assert len(one.live) == 1


async def test_a_dial_that_nobody_waits_for_any_more_ends():
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        swarm.network.partition("10.0.0.0", "10.0.0.1")
        with trio.move_on_after(1):
            await one.connect(other.peer_id, [_address(1)])
        await wait_all_tasks_blocked()
        assert "dials=0" in repr(one)


@pytest.mark.parametrize("offset_s", [0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06])
async def test_simultaneous_dials_settle_on_one_connection_and_no_stream_is_lost(offset_s):
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        answers = []

        async def ask(connections, number, delay_s):
            await trio.sleep(delay_s)
            for _ in range(20):
                answers.append(await _ask(connections, number))

        for first, second in ((0, offset_s), (offset_s, 0)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, one, 1, first)
                nursery.start_soon(ask, other, 0, second)
            await trio.sleep(3)
            assert len(one.live) == len(other.live) == 1
            # Two ends of one channel: the other connection is gone on both sides.
            assert repr(swarm.network) == "<MemoryNetwork channels=2 listeners=2>"
            swarm.network.disconnect("10.0.0.0", "10.0.0.1")
            await trio.sleep(1)
        assert answers == [b"hi"] * 80


async def test_a_peer_behind_a_wall_is_reached_over_the_connection_that_it_made():
    async with _swarm() as swarm:
        one = await swarm.start(0)
        client = await swarm.start(1, listen=[])
        await client.connect(one.peer_id, [_address(0)])
        await wait_all_tasks_blocked()
        assert await _ask(one, 1) == b"hi"


async def test_an_inbound_connection_ends_a_dial_that_hangs():
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        swarm.network.partition("10.0.0.0", "10.9.9.9")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.connect, other.peer_id, [Multiaddr("ip4", "10.9.9.9", 1)])
            await other.connect(one.peer_id, [_address(0)])
        assert trio.current_time() < 1
        assert len(one.live) == 1


async def test_the_next_address_is_tried_beside_one_that_does_not_answer():
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        swarm.network.partition("10.0.0.0", "10.9.9.9")
        start = trio.current_time()
        await one.connect(other.peer_id, [Multiaddr("ip4", "10.9.9.9", 1), _address(1)])
        assert trio.current_time() - start < 0.5


async def test_when_no_address_works_every_reason_is_told():
    async with _swarm() as swarm:
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
    async with _swarm() as swarm:
        one = await swarm.start(0)
        with pytest.raises(ConnectFailed, match="no address"):
            await one.connect(IDENTITIES[7].peer_id, [])


async def test_finding_another_peer_at_the_address_is_told():
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        with pytest.raises(WrongPeer):
            await one.connect(IDENTITIES[5].peer_id, [_address(1)])
        assert await _ask(one, 1) == b"hi"
        assert len(other.live) == 1


async def test_any_peer_that_answers_is_taken_where_no_peer_was_named():
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        connection = await one.connect(None, [_address(1)])
        assert connection.peer_id == other.peer_id
        assert await one.connect(None, [_address(1)]) is connection


@pytest.mark.parametrize(("dialler", "listener"), [(0, 1), (1, 0)])
async def test_a_peer_that_was_found_twice_keeps_its_first_connection(dialler, listener):
    async with _swarm() as swarm:
        peers = await swarm.pair()
        first = await peers[dialler].connect(None, [_address(listener)])
        assert await peers[dialler].connect(None, [_address(listener)]) is first
        assert await _ask(peers[listener], dialler) == b"hi"
        assert repr(swarm.network) == "<MemoryNetwork channels=2 listeners=2>"


async def test_a_peer_does_not_dial_itself():
    async with _swarm() as swarm:
        one = await swarm.start(0)
        with pytest.raises(InvalidRequest, match="itself"):
            await one.connect(one.peer_id, [_address(0)])
        with pytest.raises(ConnectFailed, match="the peer is ourselves"):
            await one.connect(None, [_address(0)])


async def test_streams_to_oneself_reach_ones_own_handlers_and_no_observer():
    async with _swarm() as swarm:
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
    async with _swarm() as swarm:
        one, other = await swarm.start(0, swarm_key=b"k" * 32), await swarm.start(1, swarm_key=b"k" * 32)
        stranger = await swarm.start(2)
        assert await _ask(one, 1) == b"hi"
        with pytest.raises(ConnectFailed):
            await stranger.connect(other.peer_id, [_address(1)])
        assert list(other.live) == [one.peer_id]


@pytest.mark.parametrize("after_ms", range(5, 100, 10))
async def test_a_dial_that_is_cancelled_at_any_moment_leaves_nothing_behind(after_ms):
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        with trio.move_on_after(after_ms / 1000) as cancelled:
            await one.connect(other.peer_id, [_address(1)])
        await trio.sleep(3)
        expected = 0 if cancelled.cancelled_caught else 1
        assert len(one.live) == len(other.live) == expected
        assert repr(swarm.network) == f"<MemoryNetwork channels={2 * expected} listeners=2>"
        assert await _ask(one, 1) == b"hi"


# Peers that keep the handshake and not the rest.


class Rogue:
    """One number's identity, dialling another with a bare protocol machine."""

    def __init__(self, swarm, number=1):
        self.core = ConnectionMachine(IDENTITIES[number], initiator=True, now=trio.current_time())
        self._transport = swarm.network.transport(f"10.0.0.{number}")

    async def shake(self, other=0):
        self.channel = await self._transport.dial(_address(other))
        await self.flush()
        self.core.receive(await self.channel.receive(), trio.current_time())
        await self.flush()

    async def flush(self):
        with suppress(ConnectionLost):  # what it said before it closed is still to be read
            while (message := self.core.next_message(trio.current_time())) is not None:
                await self.channel.send(message)

    async def until(self, kind):
        """Answer like an honest peer until an event of this kind comes."""
        while True:
            while (event := self.core.next_event()) is not None:
                if isinstance(event, kind):
                    return event
            self.core.receive(await self.channel.receive(), trio.current_time())
            await self.flush()


async def test_a_peer_that_opens_a_stream_before_the_hello_is_shown_out():
    async with _swarm() as swarm:
        one = await swarm.start(1)
        rogue = Rogue(swarm, number=0)
        await rogue.shake(other=1)
        rogue.core.open_stream("/echo/1", Priority.CONTROL)
        await rogue.flush()
        gone = await rogue.until(GoneAway)
        assert (gone.code, gone.reason) == ("protocol", "the peer opened a stream before its hello")
        assert not one.live


async def test_a_peer_that_says_hello_out_of_turn_is_shown_out():
    async with _swarm() as swarm:
        await swarm.start(0)
        rogue = Rogue(swarm)
        await rogue.shake()
        await rogue.until(StreamOpened)
        rogue.core.open_stream(HELLO_PROTOCOL, Priority.CONTROL)
        await rogue.flush()
        assert (await rogue.until(GoneAway)).code == "protocol"


async def test_a_peer_that_never_says_hello_is_shown_out_in_ten_seconds():
    async with _swarm() as swarm:
        one = await swarm.start(0)
        rogue = Rogue(swarm)
        await rogue.shake()
        start = trio.current_time()
        assert (await rogue.until(GoneAway)).code == "handshake"
        assert trio.current_time() - start < 11
        assert not one.live


async def test_a_peer_that_lies_about_its_hello_is_shown_out():
    async with _swarm() as swarm:
        one = await swarm.start(0)
        rogue = Rogue(swarm)
        await rogue.shake()
        stream = (await rogue.until(StreamOpened)).stream
        rogue.core.send(stream, {"type": "hello", "agent": 7, "time_us": 0}, [], Priority.CONTROL)
        await rogue.flush()
        assert "agent" in (await rogue.until(GoneAway)).reason
        assert not one.live


async def test_bytes_that_are_no_frame_end_the_connection_and_the_daemon_lives_on():
    async with _swarm() as swarm:
        one = await swarm.start(0)
        rogue = Rogue(swarm)
        await rogue.shake()
        await rogue.channel.send(bytes(100))
        assert (await rogue.until(GoneAway)).code == "protocol"
        honest = await swarm.start(2)
        assert await _ask(honest, 0) == b"hi"
        assert list(one.live) == [honest.peer_id]


# Endings.


@pytest.mark.parametrize("number", [0, 1])
async def test_a_peer_that_restarts_is_taken_back_at_once(number):
    async with _swarm() as swarm:
        stays = await swarm.start(1 - number)
        async with AsyncExitStack() as life:
            first = await Swarm(swarm.network, life).start(number)
            await first.connect(stays.peer_id, [_address(1 - number)])
            # Its host vanishes without a word, and comes back with the same identity.
            swarm.network.partition("10.0.0.0", "10.0.0.1")
        swarm.network.heal("10.0.0.0", "10.0.0.1")
        second = await swarm.start(number, listen=[])
        with trio.fail_after(4):
            assert await _ask(second, 1 - number) == b"hi"
        assert len(stays.live) == 1


def _cut(network, how):
    """Make a black hole of the way there, the way back, or both, as seen from peer 0."""
    if how in ("there", "both"):
        network.lose("10.0.0.0", "10.0.0.1")
    if how in ("back", "both"):
        network.lose("10.0.0.1", "10.0.0.0")


@pytest.mark.parametrize("latency_s", [0.001, 0.1])
@pytest.mark.parametrize("how", ["there", "back", "both"])
async def test_both_sides_find_a_black_hole_in_three_seconds_and_tell_all_waiters(how, latency_s):
    async with _swarm(latency_s=latency_s) as swarm:
        one, other = await swarm.pair({"/echo/1": _echo, "/sink/1": _sink})
        lost = []
        one.on_lost.append(lambda connection: lost.append((connection.peer_id, trio.current_time())))
        other.on_lost.append(lambda connection: lost.append((connection.peer_id, trio.current_time())))
        stream = await one.open_stream(other.peer_id, "/sink/1", addresses=[_address(1)])
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
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        connection = await one.connect(other.peer_id, [_address(1)])
        await trio.sleep(20)
        _cut(swarm.network, how)
        start = trio.current_time()
        await connection.wait_lost()
        await trio.sleep(2)
        assert trio.current_time() - start < 10
        assert not other.live


async def test_a_writer_that_is_stuck_in_a_black_hole_hides_nothing():
    async with _swarm(bytes_a_second=10_000_000.0) as swarm:
        one, other = await swarm.pair({"/drain/1": _drain})
        stream = await one.open_stream(other.peer_id, "/drain/1", addresses=[_address(1)])
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
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        stream = await one.open_stream(other.peer_id, "/echo/1", addresses=[_address(1)])
        for _ in range(3):
            swarm.network.stop("10.0.0.1")
            await stream.send({}, [bytes(1 << 20)])
            await trio.sleep(stalls_s)
            swarm.network.resume("10.0.0.1")
            assert len((await stream.receive(1 << 20)).body) == 1 << 20
        assert stream.connection.lost is None


async def test_a_process_that_hangs_is_given_up_in_ten_seconds():
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        stream = await one.open_stream(other.peer_id, "/echo/1", addresses=[_address(1)])
        await trio.sleep(1)
        swarm.network.stop("10.0.0.1")
        start = trio.current_time()
        with pytest.raises(ConnectionLost, match="silent for 1"):
            await stream.receive()
        assert 9 < trio.current_time() - start < 12


@pytest.mark.parametrize("bytes_a_second", [2_000.0, 50_000.0])
async def test_bulk_on_a_slow_line_keeps_the_connection_alive_whichever_way_it_goes(bytes_a_second):
    async with _swarm(bytes_a_second=bytes_a_second) as swarm:
        one, other = await swarm.pair({"/drain/1": _drain})
        for sender, receiver in ((one, other), (other, one)):
            number = 1 if receiver is other else 0
            stream = await sender.open_stream(receiver.peer_id, "/drain/1", addresses=[_address(number)])
            await stream.send({}, [bytes(1 << 20)], priority=Priority.BULK)
        await trio.sleep(300)
        assert stream.connection.lost is None
        assert len(one.live) == len(other.live) == 1


async def test_a_partition_that_heals_lets_peers_connect_again_at_once():
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        stream = await one.open_stream(other.peer_id, "/echo/1", addresses=[_address(1)])
        _cut(swarm.network, "both")
        await stream.connection.wait_lost()
        swarm.network.heal("10.0.0.0", "10.0.0.1")
        with trio.fail_after(1):
            assert await _ask(one, 1) == b"hi"


async def test_a_peer_that_talks_and_never_reads_is_shown_out_in_a_bounded_time():
    async with _swarm() as swarm:
        one = await swarm.start(0)
        rogue = Rogue(swarm)
        await rogue.shake()
        hello = (await rogue.until(StreamOpened)).stream
        rogue.core.send(hello, {"type": "hello", "agent": "rogue", "time_us": 0}, [], Priority.CONTROL)
        rogue.core.finish(hello)
        await rogue.flush()
        await trio.sleep(1)
        ends = []
        one.on_lost.append(lambda connection: ends.append(str(connection.lost)))
        start = trio.current_time()
        while not ends:
            # Frames that want an answer, and none is ever taken from the channel.
            stream = rogue.core.open_stream("/echo/1", Priority.BULK)
            rogue.core.reset(stream, "cancelled")
            await rogue.flush()
            await trio.sleep(0.5)
        assert 55 < trio.current_time() - start < 80
        assert "talks but does not read" in ends[0]


async def test_a_killed_peer_is_lost_at_once():
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        stream = await one.open_stream(other.peer_id, "/echo/1", addresses=[_address(1)])
        await trio.sleep(1)
        start = trio.current_time()
        swarm.network.kill("10.0.0.1")
        with pytest.raises(ConnectionLost):
            await stream.receive()
        assert trio.current_time() == start
        assert isinstance(await stream.connection.wait_lost(), ConnectionLost)
        with pytest.raises(ConnectFailed):
            await one.connect(other.peer_id, [_address(1)])


async def test_the_side_that_closes_gives_the_reason():
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        connection = await one.connect(other.peer_id, [_address(1)])
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
            await self.own.connect(other.peer_id, [_address(20 + number)])
            await trio.sleep(1)


async def test_the_side_that_dialled_closes_all_but_some_unused_connections():
    async with _swarm() as swarm:
        meeting = Meeting(swarm, {"/sink/1": _sink})
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
    async with _swarm() as swarm:
        meeting = Meeting(swarm)
        told = []
        await meeting.start()
        for other in meeting.peers:
            other.on_lost.append(lambda connection: told.append((connection.farewell, connection.closed_here)))
        await trio.sleep(3 * IDLE_S)
        assert told == [(IDLE, False)] * 4


async def test_a_newcomer_gets_the_place_of_an_idle_peer_when_all_are_taken():
    async with _swarm() as swarm:
        own = await swarm.start(0, {"/sink/1": _sink}, room=ConnectionLimits(settled=2, unproven=2))
        peers = [await swarm.start(number, listen=[]) for number in (1, 2, 3, 4)]
        for peer in peers[:2]:
            await peer.connect(own.peer_id, [_address(0)])
        stream = peers[0].live[own.peer_id].open_stream("/sink/1")
        # No connection was idle for long.
        with pytest.raises(ConnectFailed):
            await peers[2].connect(own.peer_id, [_address(0)])
        await trio.sleep(SPARED_S)
        await peers[2].connect(own.peer_id, [_address(0)])
        await wait_all_tasks_blocked()
        assert list(own.live) == [peers[0].peer_id, peers[2].peer_id]
        await trio.sleep(0.1)
        assert peers[1].live == {}
        await stream.aclose()


async def test_observers_hear_of_peers_as_they_come_and_go():
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        heard = []
        one.on_connected.append(lambda connection: heard.append(("connected", connection.peer_id)))
        one.on_lost.append(lambda connection: heard.append(("lost", connection.peer_id)))
        await other.connect(one.peer_id, [_address(0)])
        await trio.sleep(1)
        swarm.network.disconnect("10.0.0.0", "10.0.0.1")
        await trio.sleep(1)
        assert heard == [("connected", other.peer_id), ("lost", other.peer_id)]


async def test_cancelling_closes_everything_within_a_second():
    async with _swarm(bytes_a_second=1000.0) as swarm:
        other = await swarm.start(1, {"/sink/1": _sink})
        with trio.CancelScope() as scope:
            async with open_connections(
                IDENTITIES[0], transport=swarm.network.transport("10.0.0.0"), handlers={}
            ) as one:
                stream = await one.open_stream(other.peer_id, "/sink/1", addresses=[_address(1)])
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
            async with _swarm() as swarm:
                await swarm.start(0)

    thread = threading.Thread(target=trio.run, args=(open_cancelled,), daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()


# Handlers.


async def test_a_protocol_that_the_peer_does_not_speak_is_refused_by_name():
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        stream = await one.open_stream(other.peer_id, "/unknown/1", addresses=[_address(1)])
        with pytest.raises(StreamReset) as caught:
            await stream.receive()
        assert caught.value.reason == UnsupportedFeature.code
        assert await _ask(one, 1) == b"hi"


@pytest.mark.parametrize(
    "error",
    [NotServed("x"), RemoteProtocolError("x"), Overloaded("x"), StreamReset("x"), ExceptionGroup("", [NotServed("x")])],
    ids=repr,
)
async def test_what_a_handler_blames_others_for_resets_its_stream_and_the_daemon_lives_on(error):
    async def fail(stream):
        await stream.receive()
        raise error

    async with _swarm() as swarm:
        one, other = await swarm.pair({"/fail/1": fail, "/echo/1": _echo})
        stream = await one.open_stream(other.peer_id, "/fail/1", addresses=[_address(1)])
        await stream.send({})
        with pytest.raises(StreamReset) as caught:
            await stream.receive()
        expected = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        assert caught.value.reason == expected.code
        assert await _ask(one, 1) == b"hi"


@pytest.mark.parametrize("error", [KeyError("a bug"), LocalProtocolError("a bug")])
async def test_a_handler_with_a_bug_ends_the_peer_loudly(error):
    async def crash(_stream):
        raise error

    async with _swarm() as swarm:
        one = await swarm.start(0)

        async def be_a_peer():
            transport = swarm.network.transport("10.0.0.1")
            async with open_connections(
                IDENTITIES[1], transport=transport, listen=[LISTEN], handlers={"/crash/1": crash}
            ) as other:
                await one.open_stream(other.peer_id, "/crash/1", addresses=[_address(1)])
                await trio.sleep_forever()

        with pytest.raises(type(error), match="a bug"):
            await be_a_peer()


async def test_a_handler_whose_tasks_are_cancelled_at_the_end_has_no_bug(caplog):
    async def several(_stream):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)

    async with _swarm() as swarm:
        one, _ = await swarm.pair({"/several/1": several})
        await one.open_stream(IDENTITIES[1].peer_id, "/several/1", addresses=[_address(1)])
        await trio.sleep(1)
    assert "bug" not in caplog.text


async def test_a_handler_that_returns_ends_its_stream_after_what_it_said():
    async def brief(stream):
        await stream.send({"said": "bye"}, [bytes(300_000)])

    async with _swarm() as swarm:
        one, other = await swarm.pair({"/brief/1": brief})
        stream = await one.open_stream(other.peer_id, "/brief/1", addresses=[_address(1)])
        assert len((await stream.receive(300_000)).body) == 300_000
        with pytest.raises(trio.EndOfChannel):
            await stream.receive()


async def test_a_handler_hears_why_its_connection_went():
    heard = []

    async def listen(stream):
        try:
            await stream.receive()
        except ConnectionLost as error:
            heard.append(error)

    async with _swarm() as swarm:
        one, other = await swarm.pair({"/listen/1": listen})
        await one.open_stream(other.peer_id, "/listen/1", addresses=[_address(1)])
        await trio.sleep(1)
        swarm.network.disconnect("10.0.0.0", "10.0.0.1")
        await trio.sleep(1)
        assert len(heard) == 1


async def test_a_handler_that_ignores_the_end_of_its_connection_is_cancelled():
    ended = trio.Event()

    async def stubborn(_stream):
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with _swarm() as swarm:
        one, other = await swarm.pair({"/stubborn/1": stubborn})
        await one.open_stream(other.peer_id, "/stubborn/1", addresses=[_address(1)])
        await trio.sleep(1)
        swarm.network.disconnect("10.0.0.0", "10.0.0.1")
        with trio.fail_after(1):
            await ended.wait()


# Streams.


async def test_a_closed_stream_says_that_we_closed_it():
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        stream = await one.open_stream(other.peer_id, "/echo/1", addresses=[_address(1)])
        await stream.aclose()
        await stream.aclose()
        for use in (stream.receive, lambda: stream.send({}), lambda: stream.wait_unsent_below(1)):
            with pytest.raises(trio.ClosedResourceError):
                await use()
        with pytest.raises(trio.ClosedResourceError):
            stream.send_nowait({})


async def test_closing_wakes_waiting_tasks():
    async with _swarm() as swarm:
        one, other = await swarm.pair()
        stream = await one.open_stream(other.peer_id, "/echo/1", addresses=[_address(1)])
        async with trio.open_nursery() as nursery:

            async def wait():
                with pytest.raises(trio.ClosedResourceError):
                    await stream.receive()

            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            stream.reset("cancelled")


async def test_leaving_a_stream_with_an_exception_resets_it_with_its_code():
    codes = []

    async def listen(stream):
        try:
            await stream.receive()
        except StreamReset as error:
            codes.append(error.reason)

    async with _swarm() as swarm:
        one, other = await swarm.pair({"/listen/1": listen})
        for error in (NotServed("x"), ValueError("x")):
            with pytest.raises(type(error)):
                async with await one.open_stream(other.peer_id, "/listen/1", addresses=[_address(1)]):
                    raise error
        with trio.move_on_after(1):
            async with await one.open_stream(other.peer_id, "/listen/1"):
                await trio.sleep_forever()
        await trio.sleep(1)
        assert codes == ["not_served", "closed", "cancelled"]


async def test_sending_waits_while_much_is_unsent_and_nowait_does_not():
    async with _swarm() as swarm:
        one, other = await swarm.pair({"/sink/1": _sink})
        stream = await one.open_stream(other.peer_id, "/sink/1", addresses=[_address(1)])
        await stream.send({}, [bytes(1 << 20)])
        with trio.move_on_after(1) as waited:
            await stream.send({}, [b"x"])
        assert waited.cancelled_caught
        assert stream.unsent_messages == 1
        stream.send_nowait({}, [b"x"], priority=Priority.BULK)
        assert stream.unsent_messages == 2
        with pytest.raises(trio.TooSlowError), trio.fail_after(1):
            await stream.wait_unsent_below(2)


async def test_waiting_for_unsent_messages_ends_when_they_have_left():
    async def drain(stream):
        for _ in range(4):
            await stream.receive(1 << 20)

    async with _swarm() as swarm:
        one, other = await swarm.pair({"/drain/1": drain})
        async with await one.open_stream(other.peer_id, "/drain/1", addresses=[_address(1)]) as stream:
            for _ in range(4):
                stream.send_nowait({}, [bytes(1 << 20)])
            await stream.wait_unsent_below(2)
            assert stream.unsent_messages == 1
            await stream.wait_unsent_below(1)
            assert stream.unsent_messages == 0
