"""How hosted sessions end, and how clients come back to them."""

import pytest
import torch
import trio

from peerd.protocol.errors import (
    Evicted,
    RemoteProtocolError,
    StreamReset,
)
from peerd.protocol.messages.session import (
    Opened,
)
from peerd.protocol.span import Span
from peerd.server.server import LINGER_S
from peerd.server.sessions.evictions import IDLE_S, LENT_S, NEVER_USED_S
from peerd.testing.fake_engine import fake_forward
from tests.fakes.rude_clients import answer, is_cut_short, next_answer, send, serves_well, step, tokens


async def test_an_idle_session_is_evicted_with_a_word_and_its_stream_ends(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        stream = await caller.open(host)
        await answer(caller, stream, tokens(1))
        await trio.sleep(IDLE_S - 20)
        assert host.server.sessions == 1
        await trio.sleep(40)
        assert host.server.sessions == 0
        assert host.task.engine.free_tokens == 4096
        assert isinstance(await next_answer(stream), Evicted)
        with pytest.raises(trio.EndOfChannel):
            await stream.receive()
        # Steps that come too late are dropped.
        assert await is_cut_short(stream, [step(tokens(1), seq, start=1) for seq in range(2, 9)])
        assert await serves_well(swarm, host)


async def test_waiting_for_room_is_not_being_idle(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, kv_tokens=256)
        first, caller = await swarm.caller(), await swarm.caller()
        stream = await first.open(host, max_length=256)
        waiting = await caller.stream(host)
        await waiting.send(caller.opening(host, timeout_ms=600_000).to_header())
        for seq in range(1, 6):
            await trio.sleep(4)
            await answer(first, stream, tokens(1), seq, start=seq - 1)
        third = await (await swarm.caller()).stream(host)
        await third.send(caller.opening(host, session=b"t" * 16, timeout_ms=600_000).to_header())
        stream.reset("closed")
        assert isinstance(await caller.hear(waiting), Opened)
        await trio.sleep(4)
        assert torch.equal(await answer(caller, waiting, tokens(1)), fake_forward(tokens(1), Span(0, 4)))


async def test_kv_that_is_reserved_and_never_used_goes_to_waiting_sessions(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, kv_tokens=256)
        hoarders = [await (await swarm.caller()).open(host, max_length=128) for _ in range(2)]
        honest = await swarm.caller()
        waiting = await honest.stream(host)
        began = trio.current_time()
        await waiting.send(honest.opening(host, max_length=64, timeout_ms=20_000).to_header())
        assert isinstance(await honest.hear(waiting), Opened)
        assert trio.current_time() - began <= NEVER_USED_S + 2
        # One of them made enough room.
        assert isinstance(await next_answer(hoarders[0]), Evicted)
        assert host.server.sessions == 2


async def test_a_session_that_steps_keeps_its_kv_and_an_idle_one_gives_it_to_waiting_sessions(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, kv_tokens=256)
        busy, resting, honest = [await swarm.caller() for _ in range(3)]
        used, rested = await busy.open(host, max_length=128), await resting.open(host, max_length=128)
        await answer(resting, rested, tokens(64))
        await answer(busy, used, tokens(64))
        waiting = await honest.stream(host)
        began = trio.current_time()
        await waiting.send(honest.opening(host, max_length=64, timeout_ms=30_000).to_header())
        async with trio.open_nursery() as nursery:

            async def go_on():
                for seq in range(1, 100):
                    await answer(busy, used, tokens(1), 1 + seq, start=63)
                    await trio.sleep(4)

            nursery.start_soon(go_on)
            assert isinstance(await honest.hear(waiting), Opened)
            assert LENT_S - 2 <= trio.current_time() - began <= LENT_S + 2
            nursery.cancel_scope.cancel()
        assert isinstance(await next_answer(rested), Evicted)


async def test_what_a_resting_session_holds_counts_as_free_for_others(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, kv_tokens=256)
        caller = await swarm.caller()
        stream = await caller.open(host, max_length=128)
        (served,) = host.server.spans
        await answer(caller, stream, tokens(33))
        assert host.server.lent_tokens(served) == 0
        await trio.sleep(LENT_S)
        assert host.server.lent_tokens(served) == 96
        await answer(caller, stream, tokens(1), 1, start=33)
        assert host.server.lent_tokens(served) == 0


async def test_nobody_waits_so_a_session_may_rest(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, kv_tokens=256)
        caller = await swarm.caller()
        stream = await caller.open(host, max_length=256)
        await trio.sleep(IDLE_S - 2 * LENT_S)
        assert torch.equal(await answer(caller, stream, tokens(1)), fake_forward(tokens(1), Span(0, 4)))


async def test_a_step_larger_than_its_session_is_refused_before_it_is_taken_in(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        stream = await caller.open(host, max_length=1)
        await send(stream, tokens(100))
        with pytest.raises(StreamReset, match=RemoteProtocolError.code):
            await stream.receive()
        assert await serves_well(swarm, host)


@pytest.mark.parametrize("ending", ["reset", "finish"])
async def test_a_client_that_ends_its_stream_frees_its_kv_at_once(open_swarm, ending):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        stream = await (await swarm.caller()).open(host)
        await send(stream, tokens(200), want="all")
        stream.reset("cancelled") if ending == "reset" else stream.finish()
        await trio.sleep(0.1)
        assert host.server.sessions == 0
        assert host.task.engine.free_tokens == 4096


async def test_a_broken_connection_leaves_the_session_time_to_be_taken_up_again(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        row = tokens(9)
        stream = await caller.open(host)
        await answer(caller, stream, row[:5])
        for _ in range(3):
            swarm.network.disconnect(caller.ip, host.ip)
            # Longer in all than one absence may last.
            await trio.sleep(LINGER_S - 2)
            stream = await caller.stream(host)
            said = await caller.ask(stream, caller.opening(host))
            assert isinstance(said, Opened)
            assert said.have == ((0, 5),)
            await trio.sleep(4)
        result = await answer(caller, stream, row[5:], 2, start=5, want="all")
        assert torch.equal(result, fake_forward(row, Span(0, 4))[5:])
        swarm.network.disconnect(caller.ip, host.ip)
        await trio.sleep(LINGER_S + 2)
        assert host.server.sessions == 0
        assert host.task.engine.free_tokens == 4096


async def test_a_client_that_leaves_for_good_leaves_nothing_behind(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        stream = await caller.open(host)
        await answer(caller, stream, tokens(5))
        # What the stream would still say is dropped with its connection.
        stream.reset("closed")
        caller.connections.live[host.peer_id].close()
        await trio.sleep(0.1)
        assert host.server.sessions == 0
        assert host.task.engine.free_tokens == 4096


async def test_nobody_else_can_take_a_session_up(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller, thief = await swarm.caller(), await swarm.caller()
        stream = await caller.open(host)
        await answer(caller, stream, tokens(5))
        swarm.network.disconnect(caller.ip, host.ip)
        await trio.sleep(1)
        other = await thief.stream(host)
        said = await thief.ask(other, thief.opening(host))
        # The same id of another peer is another session, and an empty one.
        assert isinstance(said, Opened)
        assert said.have == ()
        assert host.server.sessions == 2
        back = await caller.stream(host)
        assert (await caller.ask(back, caller.opening(host))).have == ((0, 5),)


async def test_a_client_that_vanishes_is_forgotten(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        await caller.open(host)
        swarm.vanish(caller.client)
        await trio.sleep(60)
        assert host.server.sessions == 0
        assert host.task.engine.free_tokens == 4096
        assert not host.connections.live


@pytest.mark.parametrize("ticks", range(6))
async def test_a_handler_that_is_cancelled_while_the_server_stops_is_no_bug(open_swarm, ticks):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        await answer(caller, await caller.open(host), tokens(1))
        (connection,) = host.connections.live.values()
        host.server._nursery.cancel_scope.cancel()
        for _ in range(ticks):
            await trio.lowlevel.checkpoint()
        connection._handling.cancel_scope.cancel()
        await trio.sleep(1)
        assert host.server.draining
