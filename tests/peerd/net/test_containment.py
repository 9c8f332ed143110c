"""An exception that a stranger causes on one connection ends that connection only."""

import logging
from contextlib import asynccontextmanager, suppress
from itertools import pairwise

import pytest
import trio

from peerd.net.connections import open_connections
from peerd.net.containment import MAX_PAUSE_S, STEADY_S, Containment
from peerd.net.limits.scores import BANNED_S, BUG, FALLS_A_SECOND
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.frames import GoAwayFrame, PingFrame, PongFrame, ResetFrame, encode_frame
from peerd.protocol.errors import ConnectionLost, PeerdError, PeerFault, StreamReset
from peerd.protocol.identity import Identity
from peerd.testing.hostile import HostilePeer, hello_message, message_bytes
from peerd.testing.network import MemoryNetwork

PORT = 31330
# So many failures within a minute are too many; one a minute is not.
MAX_FAILURES = 3
HOST, CALLER, OTHER = "8.8.8.1", "8.8.8.2", "8.8.8.3"
# By PeerId: the first one decides between two connections of the second.
SMALL, LARGE, THIRD = sorted((Identity.from_seed(bytes([n]) * 32) for n in range(1, 4)), key=lambda one: one.peer_id)


class Bug(Exception):
    """An exception that no handler names."""


async def _echo(stream):
    message = await stream.receive()
    await stream.send(message.header)


async def _buggy(stream):
    await stream.receive()
    raise Bug


async def _buggy_in_a_group(stream):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        await stream.receive()
        raise Bug


HANDLERS = {"/echo/1": _echo, "/bug/1": _buggy, "/group/1": _buggy_in_a_group}


@asynccontextmanager
async def _pair(handlers=HANDLERS, *, is_strict=False):
    """A host and a caller that is connected to it."""
    network = MemoryNetwork(latency_s=0.01)
    async with (
        open_connections(
            SMALL,
            transport=network.transport(HOST),
            listen=[Multiaddr("ip4", HOST, PORT)],
            handlers=handlers,
            containment=Containment(is_strict),
        ) as host,
        open_connections(LARGE, transport=network.transport(CALLER), handlers={}) as caller,
    ):
        yield network, host, caller


async def _ask(caller, protocol):
    stream = await caller.open_stream(SMALL.peer_id, protocol, addresses=[Multiaddr("ip4", HOST, PORT)])
    async with stream:
        await stream.send({"n": 1})
        return (await stream.receive()).header


@pytest.mark.parametrize("protocol", ["/bug/1", "/group/1"])
async def test_a_bug_in_a_handler_ends_its_connection_and_no_more(protocol, caplog):
    async with _pair() as (network, host, caller):
        async with open_connections(THIRD, transport=network.transport(OTHER), handlers={}) as other:
            assert await _ask(other, "/echo/1") == {"n": 1}
            bystander = other.live[SMALL.peer_id]
            assert await _ask(caller, "/echo/1") == {"n": 1}
            connection = caller.live[SMALL.peer_id]
            with pytest.raises(PeerFault):
                await _ask(caller, protocol)
            await trio.sleep(1)
            assert connection.farewell == "internal"
            assert "a bug of ours" in str(connection.lost)
            assert host.containment.counts == {f"the handler of {protocol}: Bug": 1}
            assert "test_containment.py" in caplog.text
            assert await _ask(other, "/echo/1") == {"n": 1}
            assert other.live[SMALL.peer_id] is bystander
        assert await _ask(caller, "/echo/1") == {"n": 1}


async def test_under_strict_the_same_bug_is_raised():
    async def provoke():
        async with _pair(is_strict=True) as (_, _, caller):
            await _ask(caller, "/bug/1")

    with pytest.raises(Bug):
        await provoke()


async def test_tests_are_strict():
    assert Containment().is_strict


@pytest.mark.parametrize("error", [trio.ClosedResourceError, trio.BrokenResourceError, trio.EndOfChannel, StreamReset])
@pytest.mark.parametrize("in_a_group", [False, True])
async def test_the_end_of_a_stream_under_a_handler_is_no_bug(error, in_a_group):
    async def handler(stream):
        await stream.receive()
        ending = error("it ended")
        raise ExceptionGroup("two tasks", [ending, trio.ClosedResourceError()]) if in_a_group else ending

    async with _pair({"/ends/1": handler, "/echo/1": _echo}, is_strict=True) as (_, _, caller):
        with pytest.raises(StreamReset):
            await _ask(caller, "/ends/1")
        connection = caller.live[SMALL.peer_id]
        assert await _ask(caller, "/echo/1") == {"n": 1}
        assert caller.live[SMALL.peer_id] is connection


async def test_an_observer_that_fails_disturbs_nobody():
    def observe(_connection):
        raise Bug

    async with _pair() as (_, host, caller):
        host.on_connected.append(observe)
        host.on_lost.append(observe)
        assert await _ask(caller, "/echo/1") == {"n": 1}
        caller.live[SMALL.peer_id].close()
        await trio.sleep(1)
        assert await _ask(caller, "/echo/1") == {"n": 1}
        assert host.containment.counts == {"an observer of connections: Bug": 3}


async def test_a_transport_that_fails_is_a_failed_dial_and_no_more():
    class Broken:
        async def dial(self, _address, _tasks, _policy):
            raise Bug

    async with open_connections(SMALL, transport=Broken(), handlers={}, containment=Containment(False)) as one:
        for _ in range(2):
            with pytest.raises(PeerFault):
                await one.connect(LARGE.peer_id, [Multiaddr("ip4", HOST, PORT)])
        assert one.containment.counts == {"a dial: Bug": 2}


async def test_a_peer_that_causes_failures_again_and_again_is_refused_for_ten_minutes(caplog):
    caplog.set_level(logging.ERROR)
    async with _pair() as (network, _host, caller):
        for _ in range(MAX_FAILURES):
            with pytest.raises(PeerFault):
                await _ask(caller, "/bug/1")
        # The stack is written once, not each time.
        assert caplog.text.count("Traceback") == 1
        with pytest.raises(PeerdError):
            await _ask(caller, "/echo/1")
        # Nor does another key help at that address; others are welcome.
        async with (
            open_connections(THIRD, transport=network.transport(CALLER), handlers={}) as moved,
            open_connections(Identity.from_seed(b"9" * 32), transport=network.transport(OTHER), handlers={}) as other,
        ):
            with pytest.raises(PeerdError):
                await _ask(moved, "/echo/1")
            assert await _ask(other, "/echo/1") == {"n": 1}
        await trio.sleep(BANNED_S)
        assert await _ask(caller, "/echo/1") == {"n": 1}


async def test_failures_now_and_then_are_no_reason_to_refuse():
    async with _pair() as (_, _, caller):
        for _ in range(2 * MAX_FAILURES):
            with pytest.raises(PeerFault):
                await _ask(caller, "/bug/1")
            await trio.sleep(BUG / FALLS_A_SECOND)
        assert await _ask(caller, "/echo/1") == {"n": 1}


async def _enter(network):
    """A connection to the host that says whatever we like, as LARGE; nothing answers the host's PINGs there."""
    peer = HostilePeer(LARGE, await network.transport(CALLER).dial(Multiaddr("ip4", HOST, PORT)))
    with trio.move_on_after(0.5):
        await peer.enter(message_bytes(hello_message(0)))
    return peer


async def test_two_connections_of_one_peer_that_end_in_the_same_tick_leave_nothing_behind():
    """The host is deciding between them: whichever of both ends it hears of first, neither may stay in its books."""
    async with _pair() as (network, host, caller):
        # Which task a tick runs first is up to chance: often enough that both happen.
        for _ in range(12):
            # The second is told nothing yet: the host asks the first for a sign of life.
            peers = [await _enter(network) for _ in range(2)]
            async with trio.open_nursery() as nursery:
                for peer in peers:
                    nursery.start_soon(peer.send, encode_frame(GoAwayFrame("closed")))
            await trio.sleep(0.1)
            assert not host.live
            with trio.fail_after(5):
                assert await _ask(caller, "/echo/1") == {"n": 1}
            caller.live[SMALL.peer_id].close()
            await trio.sleep(1)


async def test_bodies_that_are_claimed_and_begun_fill_no_more_than_a_share():
    """Each stream claims a MiB and sends some of it; the host's budget is a hundredth of what is claimed."""

    async def take(stream):
        await stream.receive(2**20)

    async with _pair({"/echo/1": _echo, "/take/1": take}, is_strict=True) as (network, host, _):
        host.budget.total_bytes = 2**21
        peer = await _enter(network)
        begun = message_bytes({"n": 1})[:-4] + (2**20).to_bytes(4, "big") + bytes(20_000)
        heard = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_hear, peer, heard)
            try:
                for _ in range(200):
                    await peer.say(await peer.open("/take/1"), begun)
                    assert host.budget.used_bytes <= 2**20
                    await trio.sleep(0.01)
            except ConnectionLost:
                pass
            async with open_connections(THIRD, transport=network.transport(OTHER), handlers={}) as other:
                assert await _ask(other, "/echo/1") == {"n": 1}
            await peer.aclose()
        assert any(isinstance(frame, ResetFrame | GoAwayFrame) and frame.code == "overloaded" for frame in heard)
        await trio.sleep(1)
        assert host.budget.used_bytes == 0


async def _hear(peer, heard):
    with suppress(ConnectionLost):
        while True:
            frame = await peer.hear()
            heard.append(frame)
            if isinstance(frame, PingFrame):
                await peer.send(encode_frame(PongFrame(frame.token)))


async def test_a_task_that_fails_starts_again_after_ever_longer_pauses():
    started = []

    async def fail():
        started.append(trio.current_time())
        raise Bug

    with trio.move_on_after(3 * MAX_PAUSE_S):
        await Containment(is_strict=False).keep_running(fail, what="a task")
    assert started[:5] == pytest.approx([0, 1, 3, 7, 15])
    assert started[-1] - started[-2] == pytest.approx(MAX_PAUSE_S)


async def test_a_task_that_ran_well_for_long_before_it_failed_starts_again_at_once():
    started = []

    async def fail_in_the_end():
        started.append(trio.current_time())
        if len(started) > 3:
            await trio.sleep(STEADY_S)
        raise Bug

    with trio.move_on_after(3 * STEADY_S):
        await Containment(is_strict=False).keep_running(fail_in_the_end, what="a task")
    assert [later - before for before, later in pairwise(started[3:])] == [STEADY_S + 1] * 2


async def test_a_task_that_ends_is_not_started_again():
    arguments = []

    async def end(one, other):
        arguments.append((one, other))

    await Containment(is_strict=False).keep_running(end, 1, 2, what="a task")
    assert arguments == [(1, 2)]


async def test_a_strict_task_fails_at_once():
    async def fail():
        raise Bug

    with pytest.raises(Bug):
        await Containment(is_strict=True).keep_running(fail, what="a task")
