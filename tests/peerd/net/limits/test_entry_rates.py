"""Strangers that shake hands, open streams or break the protocol as fast as they can, and honest peers beside them."""

from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio

from peerd.net.connections import open_connections
from peerd.net.containment import Containment
from peerd.net.limits.entry_rates import (
    HANDSHAKES_A_SECOND,
    HANDSHAKES_AT_ONCE,
    MAX_REFUSED_OPENS,
    OPENS_A_SECOND,
    OPENS_AT_ONCE,
)
from peerd.net.limits.gate import ConnectionLimits
from peerd.net.limits.scores import BANNED_S, LIMIT, MALFORMED
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.frames import (
    GoAwayFrame,
    OpenFrame,
    PingFrame,
    PongFrame,
    Priority,
    ResetFrame,
    encode_frame,
)
from peerd.protocol.errors import ConnectionLost, PeerdError, PeerFault
from peerd.protocol.identity import Identity
from peerd.testing.hostile import HostilePeer, hello_message, message_bytes
from peerd.testing.network import MemoryNetwork

HOST, HONEST = "8.8.8.8", "9.9.9.9"
ADDRESS = Multiaddr("ip4", HOST, 31330)
# The host decides between two connections, so what it sends first says that it took one.
HOST_IDENTITY = min((Identity.from_seed(bytes([n]) * 32) for n in range(1, 9)), key=lambda one: one.peer_id)


async def _echo(stream):
    await stream.send((await stream.receive()).header)


@asynccontextmanager
async def _host(**arguments):
    network = MemoryNetwork(latency_s=0.01)
    async with open_connections(
        HOST_IDENTITY,
        transport=network.transport(HOST),
        listen=[ADDRESS],
        handlers={"/echo/1": _echo},
        containment=Containment(is_strict=True),
        **arguments,
    ) as host:
        yield network, host


async def _asks(network, identity=None, ip=HONEST):
    """Whether an honest peer gets its answer."""
    identity = identity or Identity.generate()
    async with open_connections(identity, transport=network.transport(ip), handlers={}) as one:
        with suppress(PeerdError):
            stream = await one.open_stream(HOST_IDENTITY.peer_id, "/echo/1", addresses=[ADDRESS])
            await stream.send({"n": 1})
            return (await stream.receive()).header == {"n": 1}
    return False


async def _enter(network, ip, identity=None):
    """A hostile peer's connection to the host. Raises PeerFault if the host refuses it."""
    identity = identity or Identity.generate()
    peer = HostilePeer(identity, await network.transport(ip).dial(ADDRESS))
    await peer.enter(message_bytes(hello_message(0)))
    return peer


async def _flood(peer, count, heard):
    """Open and forget `count` streams, and note what the host says of it."""

    async def listen():
        with suppress(ConnectionLost):
            while True:
                frame = await peer.hear()
                heard.append(frame)
                if isinstance(frame, PingFrame):
                    await peer.send(encode_frame(PongFrame(frame.token)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        with suppress(ConnectionLost):
            for number in range(count):
                # Below what one connection may do: only all of them together are too fast.
                if number % 100 == 99:
                    await trio.sleep(100 / OPENS_A_SECOND)
                stream = peer._next_stream
                peer._next_stream += 2
                await peer.send(encode_frame(OpenFrame(stream, "/none/1", Priority.BULK, 1024)))
        await trio.sleep(1)
        await peer.aclose()
        nursery.cancel_scope.cancel()


async def test_keys_of_one_network_open_no_more_streams_than_one_connection_may():
    async with _host() as (network, host):
        heard = [[] for _ in range(4)]
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number, own in enumerate(heard):
                peer = await _enter(network, f"7.7.7.{number}")
                nursery.start_soon(_flood, peer, 2000, own)
            assert await _asks(network)
        took_s = trio.current_time() - began
        accepted = sum(isinstance(one, ResetFrame) and one.code == "unsupported" for own in heard for one in own)
        refused = sum(isinstance(one, ResetFrame) and one.code == "overloaded" for own in heard for one in own)
        assert accepted <= OPENS_AT_ONCE + OPENS_A_SECOND * took_s
        assert refused <= 4 * (MAX_REFUSED_OPENS + 1)
        assert all(any(isinstance(one, GoAwayFrame) and one.code == "overloaded" for one in own) for own in heard)
        assert {score.reasons.get("too many streams") for score in host.containment.scores.listed(0)} == {1}


async def test_a_stranger_that_dials_again_and_again_gets_few_handshakes_and_disturbs_nobody():
    async with _host() as (network, _):
        entered = 0
        began = trio.current_time()
        while trio.current_time() < began + 20:
            with suppress(PeerFault):
                peer = await _enter(network, "7.7.7.7")
                entered += 1
                await peer.aclose()
            await trio.sleep(0.01)
        assert 0.8 <= entered / (HANDSHAKES_AT_ONCE + 20 * HANDSHAKES_A_SECOND) <= 1.01
        assert await _asks(network)
        # It is let in again when it has waited.
        await trio.sleep(1 / HANDSHAKES_A_SECOND)
        assert await _asks(network, ip="7.7.7.7")


async def test_a_key_that_dials_from_many_networks_is_told_that_it_does_so_too_often():
    async with _host() as (network, _):
        key = Identity.generate()
        answered = [await _asks(network, key, f"7.7.{n}.7") for n in range(64)]
        assert all(answered[:32])
        assert not all(answered)
        assert await _asks(network)


async def test_a_whole_network_that_starts_at_once_is_let_in():
    async with _host() as (network, host):
        answered = []

        async def start(number):
            answered.append(await _asks(network, ip=f"7.7.7.{number}"))

        for again in range(2):
            async with trio.open_nursery() as nursery:
                for number in range(100, 116):
                    nursery.start_soon(start, number)
            assert answered == [True] * 16 * (again + 1)
        assert not host.containment.scores.listed(trio.current_time())


async def test_a_network_has_a_quarter_of_the_places_however_many_keys_it_has():
    async with _host(room=ConnectionLimits(settled=16, unproven=16)) as (network, host):
        held = []
        async with trio.open_nursery() as nursery:
            for number in range(8):
                with suppress(PeerFault):
                    held.append(await _enter(network, f"7.7.7.{number}"))
                    # An open stream: the connection is never idle.
                    await held[-1].open("/echo/1")
                    nursery.start_soon(_stay, held[-1])
                await trio.sleep(0.5)
            assert len(host.live) == 4
            assert await _asks(network)
            nursery.cancel_scope.cancel()


async def _stay(peer):
    with suppress(ConnectionLost):
        while True:
            if isinstance(frame := await peer.hear(), PingFrame):
                await peer.send(encode_frame(PongFrame(frame.token)))


@pytest.mark.parametrize("is_same_key", [True, False])
async def test_a_peer_that_breaks_the_protocol_again_and_again_is_banned_for_ten_minutes(is_same_key):
    async with _host() as (network, host):
        key = Identity.generate()
        identity = partial(lambda: key) if is_same_key else Identity.generate
        for _ in range(int(LIMIT / MALFORMED) + 1):
            peer = await _enter(network, "7.7.7.7", identity())
            await peer.send(b"no frame")
            await trio.sleep(0.05)
        worst = host.containment.scores.listed(trio.current_time())[0]
        assert worst.name == (str(key.peer_id) if is_same_key else "7.7.7.7")
        assert worst.banned_s == pytest.approx(BANNED_S, abs=1)
        assert not await _asks(network, identity(), "7.7.7.7")
        assert not is_same_key or not await _asks(network, key, "6.6.6.6")
        assert await _asks(network)
        await trio.sleep(BANNED_S)
        assert await _asks(network, identity(), "7.7.7.7")
        assert not host.containment.scores.listed(trio.current_time())


async def test_what_answers_where_we_were_sent_is_not_held_against_the_address():
    """Strangers choose whom we dial: otherwise they would choose whom we refuse."""
    async with (
        _host() as (network, host),
        open_connections(Identity.generate(), transport=network.transport(HONEST), handlers={}) as honest,
    ):

        async def talk_nonsense(channel):
            await channel.receive()
            await channel.send(b"220 mail ESMTP")

        async with trio.open_nursery() as nursery:
            elsewhere = Multiaddr("ip4", HONEST, 25)
            await nursery.start(partial(network.transport(HONEST).listen, elsewhere, talk_nonsense))
            for _ in range(12):
                with pytest.raises(PeerFault):
                    await host.connect(honest.peer_id, [elsewhere])
            nursery.cancel_scope.cancel()
        assert not host.containment.scores.listed(trio.current_time())


async def test_a_peer_whose_neighbours_use_up_the_rate_of_its_network_is_refused_but_not_put_out():
    async with _host() as (network, host):
        key = Identity.generate()
        honest = await _enter(network, "7.7.7.1", key)
        heard = []
        async with trio.open_nursery() as nursery:
            for number in range(2, 5):
                nursery.start_soon(_flood, await _enter(network, f"7.7.7.{number}"), 2000, [])

            async def go_on():
                with suppress(ConnectionLost):
                    while True:
                        heard.append(await honest.hear())
                        if isinstance(heard[-1], PingFrame):
                            await honest.send(encode_frame(PongFrame(heard[-1].token)))

            nursery.start_soon(go_on)
            # As fast as peerd itself asks at most, and for longer than it takes to count up to the limit.
            for _ in range(10 * 115):
                stream, honest._next_stream = honest._next_stream, honest._next_stream + 2
                await honest.send(encode_frame(OpenFrame(stream, "/none/1", Priority.BULK, 1024)))
                await trio.sleep(1 / 115)
            assert not any(isinstance(one, GoAwayFrame) for one in heard)
            nursery.cancel_scope.cancel()
        assert any(isinstance(one, ResetFrame) and one.code == "overloaded" for one in heard)
        assert str(key.peer_id) not in {score.name for score in host.containment.scores.listed(trio.current_time())}
