"""A server against clients that open sessions wrongly, or too many: each pays alone."""

import pytest
import torch
import trio

from peerd.exchange.first_message import FIRST_MESSAGE_S
from peerd.protocol.errors import (
    ContextTooLong,
    Draining,
    NoRoom,
    NotServed,
    Overloaded,
    RemoteProtocolError,
    StreamReset,
    UnsupportedFeature,
)
from peerd.protocol.messages.session import (
    Opened,
)
from peerd.protocol.span import Span
from peerd.server.sessions.session_table import MAX_SESSIONS_A_PEER
from peerd.testing.fake_engine import fake_forward
from tests.fakes.rude_clients import answer, is_ended, serves_well, tokens


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"needs": ("fork", "time_travel")}, UnsupportedFeature, "time_travel"),
        ({"codec": "zip"}, UnsupportedFeature, "zip"),
        ({"adapter": "poet"}, UnsupportedFeature, "poet"),
        ({"model": b"m" * 32}, NotServed, "0:4"),
        ({"start": 2, "end": 5}, NotServed, "2:5"),
        ({"start": 3, "end": 3}, NotServed, "3:3"),
        ({"start": 3, "end": 1}, NotServed, "3:1"),
        ({"max_length": 1024, "max_rows": 256}, ContextTooLong, "4096"),
        ({"max_length": 1025}, ContextTooLong, "1025 positions: this model takes 1024"),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(open_swarm, fields, error, text):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        refusal = await caller.refused(host, **fields)
        assert type(refusal) is error
        assert text in str(refusal)
        assert host.server.sessions == 0
        assert host.task.engine.free_tokens == 4096


async def test_a_step_before_open_is_a_protocol_error(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        stream = await caller.stream(host)
        assert isinstance(await answer(None, stream, tokens(0)), RemoteProtocolError)
        assert await is_ended(stream)
        # With a body it is not even heard to its end: an `open` has none.
        with pytest.raises(StreamReset, match=RemoteProtocolError.code):
            await answer(None, await caller.stream(host), tokens(1))


async def test_a_stream_on_which_nothing_is_said_ends(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        for protocol in host.connections.handlers:
            stream = await caller.stream(host, protocol)
            with trio.fail_after(FIRST_MESSAGE_S + 5):
                assert await is_ended(stream), protocol


async def test_a_step_brings_no_more_than_its_session_could_hold(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        stream = await caller.open(host, max_length=16, max_rows=2)
        assert isinstance(await answer(caller, stream, tokens(17)), ContextTooLong)
        with pytest.raises(StreamReset, match=RemoteProtocolError.code):
            await answer(caller, stream, tokens(65), 2)


async def test_a_session_is_opened_once(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        stream = await caller.open(host)
        assert isinstance(await caller.refused(host), RemoteProtocolError)
        # The first is none the worse for it.
        assert torch.equal(await answer(caller, stream, tokens(2)), fake_forward(tokens(2), Span(0, 4))[-1:])
        # Nor may it be opened again on its own stream.
        said = await caller.ask(stream, caller.opening(host))
        assert isinstance(said.error, RemoteProtocolError)
        assert await is_ended(stream)
        assert host.server.sessions == 0


async def test_a_session_that_waits_for_room_cannot_be_opened_again(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, kv_tokens=256)
        first, caller = await swarm.caller(), await swarm.caller()
        stream = await first.open(host, max_length=256)
        waiting = await caller.stream(host)
        await waiting.send(caller.opening(host, timeout_ms=60_000).to_header())
        await trio.sleep(0.1)
        assert isinstance(await caller.refused(host), RemoteProtocolError)
        stream.reset("closed")
        assert isinstance(await caller.hear(waiting), Opened)


async def test_a_server_tells_when_a_span_is_full_and_when_it_has_room_and_refuses_with_a_hint(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, kv_tokens=256)
        said = []
        host.task.admission.on_change.append(lambda: said.append(host.task.admission.is_full))
        first, second = await swarm.caller(), await swarm.caller()
        for _ in range(2):
            stream = await first.open(host, max_length=256)
            await trio.sleep(6)
            stream.reset("closed")
            await trio.sleep(0.1)
        stream = await first.open(host, max_length=256)
        refusal = await second.refused(host, max_length=256, timeout_ms=3000)
        assert said == [True]
        # Sessions ended every six seconds.
        assert isinstance(refusal, NoRoom)
        assert 5 < refusal.retry_after_s < 15
        stream.reset("closed")
        await trio.sleep(0.1)
        assert said == [True, False]


async def test_nobody_opens_more_sessions_than_a_peer_may_have(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        for number in range(MAX_SESSIONS_A_PEER):
            await caller.open(host, session=number.to_bytes(16, "big"), max_length=16)
        assert isinstance(await caller.refused(host, session=b"x" * 16, max_length=16), Overloaded)
        assert await serves_well(swarm, host)


async def test_a_session_too_long_for_the_pool_harms_only_its_own_client_behind_a_queue(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, kv_tokens=256)
        first, second, third = [await swarm.caller() for _ in range(3)]
        stream = await first.open(host, max_length=200)
        waiting, hopeless = await second.stream(host), await third.stream(host)
        await waiting.send(second.opening(host, timeout_ms=60_000).to_header())
        await trio.sleep(0.1)
        await hopeless.send(third.opening(host, max_length=1000, timeout_ms=60_000).to_header())
        await trio.sleep(0.1)
        stream.reset("closed")
        assert isinstance(await second.hear(waiting), Opened)
        waiting.reset("closed")
        assert isinstance((await third.hear(hopeless)).error, ContextTooLong)
        await trio.sleep(0.1)
        assert await serves_well(swarm, host)


async def test_a_request_for_more_than_is_free_shuts_no_other_out(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, kv_tokens=256)
        holder, *greedy = [await swarm.caller() for _ in range(4)]
        await holder.open(host, max_length=64)
        for caller in greedy:
            waiting = await caller.stream(host)
            await waiting.send(caller.opening(host, max_length=256, timeout_ms=600_000).to_header())
        for seed in range(3):
            assert await serves_well(swarm, host, seed)


async def test_while_others_wait_one_peer_holds_at_most_half(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, kv_tokens=256)
        greedy, other = await swarm.caller(), await swarm.caller()
        held = [await greedy.open(host, session=bytes([n]) * 16, max_length=64) for n in range(4)]
        waiting = await other.stream(host)
        await waiting.send(other.opening(host, max_length=96, timeout_ms=60_000).to_header())
        more = [await greedy.stream(host) for _ in range(2)]
        for number, stream in enumerate(more, 100):
            opening = greedy.opening(host, session=bytes([number]) * 16, max_length=64, timeout_ms=5000)
            await stream.send(opening.to_header())
        await trio.sleep(0.1)
        held[0].reset("closed")
        held[1].reset("closed")
        assert isinstance(await other.hear(waiting), Opened)
        refusals = [await greedy.hear(stream) for stream in more]
        assert all(isinstance(said.error, NoRoom) for said in refusals)


async def test_a_peer_that_drains_refuses_new_sessions_and_lets_others_end(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        stream = await caller.open(host)
        drained = trio.Event()

        async def drain():
            await host.server.drain(60)
            drained.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            await trio.sleep(1)
            assert isinstance(await caller.refused(host, session=b"x" * 16), Draining)
            assert torch.equal(await answer(caller, stream, tokens(1)), fake_forward(tokens(1), Span(0, 4)))
            assert not drained.is_set()
            stream.reset("closed")
            await trio.sleep(0.1)
            assert drained.is_set()


async def test_a_paused_peer_refuses_new_sessions_ends_the_others_late_and_serves_again(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        stream = await caller.open(host)
        paused = trio.Event()

        async def pause():
            await host.server.pause(60)
            paused.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pause)
            await trio.sleep(1)
            assert all(map(host.server.is_leaving, host.server.spans))
            assert isinstance(await caller.refused(host, session=b"x" * 16), Draining)
            assert torch.equal(await answer(caller, stream, tokens(1)), fake_forward(tokens(1), Span(0, 4)))
            await trio.sleep(58)
            assert not paused.is_set()
            await trio.sleep(2)
            assert paused.is_set()
            assert isinstance((await caller.hear(stream)).error, Draining)
        assert host.server.sessions == 0
        host.server.paused = False
        again = await caller.open(host, session=b"y" * 16)
        assert torch.equal(await answer(caller, again, tokens(1)), fake_forward(tokens(1), Span(0, 4)))
