"""One stream: closing, errors, and waiting for room."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from peerd.protocol.connection.frames import Priority
from peerd.protocol.errors import (
    NotServed,
    StreamReset,
)
from tests.fakes.connected_peers import address_of, open_connected, sink


async def test_a_closed_stream_says_that_we_closed_it():
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        stream = await one.open_stream(other.peer_id, "/echo/1", addresses=[address_of(1)])
        await stream.aclose()
        await stream.aclose()
        for use in (stream.receive, lambda: stream.send({}), lambda: stream.wait_unsent_below(1)):
            with pytest.raises(trio.ClosedResourceError):
                await use()
        with pytest.raises(trio.ClosedResourceError):
            stream.send_nowait({})


async def test_closing_wakes_waiting_tasks():
    async with open_connected() as swarm:
        one, other = await swarm.pair()
        stream = await one.open_stream(other.peer_id, "/echo/1", addresses=[address_of(1)])
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

    async with open_connected() as swarm:
        one, other = await swarm.pair({"/listen/1": listen})
        for error in (NotServed("x"), ValueError("x")):
            with pytest.raises(type(error)):
                async with await one.open_stream(other.peer_id, "/listen/1", addresses=[address_of(1)]):
                    raise error
        with trio.move_on_after(1):
            async with await one.open_stream(other.peer_id, "/listen/1"):
                await trio.sleep_forever()
        await trio.sleep(1)
        assert codes == ["not_served", "closed", "cancelled"]


async def test_sending_waits_while_much_is_unsent_and_nowait_does_not():
    async with open_connected() as swarm:
        one, other = await swarm.pair({"/sink/1": sink})
        stream = await one.open_stream(other.peer_id, "/sink/1", addresses=[address_of(1)])
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

    async with open_connected() as swarm:
        one, other = await swarm.pair({"/drain/1": drain})
        async with await one.open_stream(other.peer_id, "/drain/1", addresses=[address_of(1)]) as stream:
            for _ in range(4):
                stream.send_nowait({}, [bytes(1 << 20)])
            await stream.wait_unsent_below(2)
            assert stream.unsent_messages == 1
            await stream.wait_unsent_below(1)
            assert stream.unsent_messages == 0
