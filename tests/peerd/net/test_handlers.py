"""The functions that answer peers' streams: what their errors do, and how they end."""

import pytest
import trio

from peerd.net.connections import open_connections
from peerd.protocol.errors import (
    ConnectionLost,
    LocalProtocolError,
    NotServed,
    Overloaded,
    RemoteProtocolError,
    StreamReset,
    UnsupportedFeature,
)
from tests.fakes.connected_peers import IDENTITIES, LISTEN, address_of, ask, echo, open_connected


async def test_a_protocol_that_the_peer_does_not_speak_is_refused_by_name():
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        stream = await one.open_stream(other.peer_id, "/unknown/1", addresses=[address_of(1)])
        with pytest.raises(StreamReset) as caught:
            await stream.receive()
        assert caught.value.reason == UnsupportedFeature.code
        assert await ask(one, 1) == b"hi"


@pytest.mark.parametrize(
    "error",
    [NotServed("x"), RemoteProtocolError("x"), Overloaded("x"), StreamReset("x"), ExceptionGroup("", [NotServed("x")])],
    ids=repr,
)
async def test_what_a_handler_blames_others_for_resets_its_stream_and_the_daemon_lives_on(error):
    async def fail(stream):
        await stream.receive()
        raise error

    async with open_connected() as swarm:
        one, other = await swarm.pair({"/fail/1": fail, "/echo/1": echo})
        stream = await one.open_stream(other.peer_id, "/fail/1", addresses=[address_of(1)])
        await stream.send({})
        with pytest.raises(StreamReset) as caught:
            await stream.receive()
        expected = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        assert caught.value.reason == expected.code
        assert await ask(one, 1) == b"hi"


@pytest.mark.parametrize("error", [KeyError("a bug"), LocalProtocolError("a bug")])
async def test_a_handler_with_a_bug_ends_the_peer_loudly(error):
    async def crash(_stream):
        raise error

    async with open_connected() as swarm:
        one = await swarm.start(0)

        async def be_a_peer():
            transport = swarm.network.transport("10.0.0.1")
            async with open_connections(
                IDENTITIES[1], transport=transport, listen=[LISTEN], handlers={"/crash/1": crash}
            ) as other:
                await one.open_stream(other.peer_id, "/crash/1", addresses=[address_of(1)])
                await trio.sleep_forever()

        with pytest.raises(type(error), match="a bug"):
            await be_a_peer()


async def test_a_handler_whose_tasks_are_cancelled_at_the_end_has_no_bug(caplog):
    async def several(_stream):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)

    async with open_connected() as swarm:
        one, _ = await swarm.pair({"/several/1": several})
        await one.open_stream(IDENTITIES[1].peer_id, "/several/1", addresses=[address_of(1)])
        await trio.sleep(1)
    assert "bug" not in caplog.text


async def test_a_handler_that_returns_ends_its_stream_after_what_it_said():
    async def brief(stream):
        await stream.send({"said": "bye"}, [bytes(300_000)])

    async with open_connected() as swarm:
        one, other = await swarm.pair({"/brief/1": brief})
        stream = await one.open_stream(other.peer_id, "/brief/1", addresses=[address_of(1)])
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

    async with open_connected() as swarm:
        one, other = await swarm.pair({"/listen/1": listen})
        await one.open_stream(other.peer_id, "/listen/1", addresses=[address_of(1)])
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

    async with open_connected() as swarm:
        one, other = await swarm.pair({"/stubborn/1": stubborn})
        await one.open_stream(other.peer_id, "/stubborn/1", addresses=[address_of(1)])
        await trio.sleep(1)
        swarm.network.disconnect("10.0.0.0", "10.0.0.1")
        with trio.fail_after(1):
            await ended.wait()
