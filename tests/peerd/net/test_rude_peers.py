"""Peers that keep the handshake and no other rule are shown out."""

import trio

from peerd.protocol.connection.events import GoneAway, StreamOpened
from peerd.protocol.connection.frames import Priority
from peerd.protocol.connection.hello import HELLO_PROTOCOL
from tests.fakes.connected_peers import Rogue, ask, open_connected


async def test_a_peer_that_opens_a_stream_before_the_hello_is_shown_out():
    async with open_connected() as swarm:
        one = await swarm.start(1)
        rogue = Rogue(swarm, number=0)
        await rogue.shake(other=1)
        rogue.core.streams.open("/echo/1", Priority.CONTROL)
        await rogue.flush()
        gone = await rogue.until(GoneAway)
        assert (gone.code, gone.reason) == ("protocol", "the peer opened a stream before its hello")
        assert not one.live


async def test_a_peer_that_says_hello_out_of_turn_is_shown_out():
    async with open_connected() as swarm:
        await swarm.start(0)
        rogue = Rogue(swarm)
        await rogue.shake()
        await rogue.until(StreamOpened)
        rogue.core.streams.open(HELLO_PROTOCOL, Priority.CONTROL)
        await rogue.flush()
        assert (await rogue.until(GoneAway)).code == "protocol"


async def test_a_peer_that_never_says_hello_is_shown_out_in_ten_seconds():
    async with open_connected() as swarm:
        one = await swarm.start(0)
        rogue = Rogue(swarm)
        await rogue.shake()
        start = trio.current_time()
        assert (await rogue.until(GoneAway)).code == "handshake"
        assert trio.current_time() - start < 11
        assert not one.live


async def test_a_peer_that_lies_about_its_hello_is_shown_out():
    async with open_connected() as swarm:
        one = await swarm.start(0)
        rogue = Rogue(swarm)
        await rogue.shake()
        stream = (await rogue.until(StreamOpened)).stream
        rogue.core.streams.send(stream, {"type": "hello", "agent": 7, "time_us": 0}, [], Priority.CONTROL)
        await rogue.flush()
        assert "agent" in (await rogue.until(GoneAway)).reason
        assert not one.live


async def test_bytes_that_are_no_frame_end_the_connection_and_the_daemon_lives_on():
    async with open_connected() as swarm:
        one = await swarm.start(0)
        rogue = Rogue(swarm)
        await rogue.shake()
        await rogue.channel.send(bytes(100))
        assert (await rogue.until(GoneAway)).code == "protocol"
        honest = await swarm.start(2)
        assert await ask(honest, 0) == b"hi"
        assert list(one.live) == [honest.peer_id]
