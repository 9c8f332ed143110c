"""A server against clients that break the rules: each pays alone, and leaves nothing behind."""

import pytest
import torch
import trio

from peerd.compute.steps import BatchOutput
from peerd.exchange.first_message import FIRST_MESSAGE_S
from peerd.exchange.step_tensors import encoded
from peerd.protocol.encoding.schema import parse
from peerd.protocol.encoding.tensors import TensorHeader, decode_tensor
from peerd.protocol.errors import (
    BadResult,
    ContextTooLong,
    Draining,
    Evicted,
    InvalidRequest,
    NoRoom,
    NotServed,
    Overloaded,
    RemoteProtocolError,
    StreamReset,
    Superseded,
    UnsupportedFeature,
)
from peerd.protocol.messages.session import (
    PROGRESS_FROM_HOP,
    PROGRESS_PROTOCOL,
    Ask,
    Failure,
    Gap,
    LinkDown,
    NextHop,
    Opened,
    Output,
    Progress,
    Route,
    Step,
)
from peerd.protocol.rows import Drop, Fork, RowSlice
from peerd.protocol.span import Span
from peerd.server.server import IDLE_S, LENT_S, LINGER_S, MAX_SESSIONS_A_PEER, NEVER_USED_S
from peerd.testing.fake_engine import FakeEngine, fake_forward

WIDTH = 8
MODEL = bytes(range(32))


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 251, (count, WIDTH), generator=generator).float()


def step(hidden, seq=1, start=0, *, epoch=0, rows=None, **fields):
    """A step's header and body, by default of row 0 from `start`."""
    if rows is None:
        rows = (RowSlice(0, start, len(hidden)),) if len(hidden) else ()
    message = Step(epoch=epoch, seq=seq, rows=tuple(rows), **fields)
    return encoded(message, hidden, "exact", torch.float32)


async def send(stream, hidden, *args, **fields):
    await stream.send(*step(hidden, *args, **fields))


async def answer(caller, stream, hidden, *args, **fields):
    """The error, gap or tensor that a step is answered with."""
    await send(stream, hidden, *args, **fields)
    return await next_answer(stream)


async def next_answer(stream):
    raw = await stream.receive(max_body=2**22)
    if raw.header["type"] == Failure.TYPE:
        return Failure.from_header(raw.header).error
    if raw.header["type"] != Output.TYPE:
        return raw.header
    output = Output.from_header(raw.header)
    if output.tensor is None:
        return None
    return decode_tensor(TensorHeader.from_fields(output.tensor, max_elements=2**20), raw.body)


async def is_ended(stream):
    """Whether the hop ends a stream on which nothing more comes."""
    with trio.move_on_after(30):
        try:
            while True:
                await stream.receive(max_body=2**22)
        except (trio.EndOfChannel, StreamReset):
            return True
    return False


async def is_cut_short(stream, messages):
    """Whether the hop ends the stream before all of these are sent."""
    try:
        for header, body in messages:
            await stream.send(header, body)
            await trio.sleep(0.01)
    except (StreamReset, trio.ClosedResourceError):
        return True
    return False


async def serves_well(swarm, host, seed=99):
    """Whether another client still gets exact answers."""
    client = await swarm.client()
    session = await client.session(host.span, max_length=64)
    row = tokens(6, seed)
    results = torch.cat([await session.step(row[i : i + 1]) for i in range(6)])
    session.close()
    return torch.equal(results, fake_forward(row, host.span))


# Opening.


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
        host.task.admission.on_change = lambda: said.append(host.task.admission.is_full)
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


# Ending and coming back.


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
        await answer(resting, rested, tokens(3))
        waiting = await honest.stream(host)
        began = trio.current_time()
        await waiting.send(honest.opening(host, max_length=64, timeout_ms=30_000).to_header())
        async with trio.open_nursery() as nursery:

            async def go_on():
                for seq in range(1, 100):
                    await answer(busy, used, tokens(1), seq, start=seq - 1)
                    await trio.sleep(4)

            nursery.start_soon(go_on)
            assert isinstance(await honest.hear(waiting), Opened)
            assert LENT_S - 2 <= trio.current_time() - began <= LENT_S + 2
            nursery.cancel_scope.cancel()
        assert isinstance(await next_answer(rested), Evicted)


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


# Steps.


@pytest.mark.parametrize(
    ("hidden", "fields", "error"),
    [
        (tokens(3), {"rows": [RowSlice(0, 0, 2)]}, RemoteProtocolError),
        (tokens(2), {"rows": [RowSlice(0, 0, 3)]}, InvalidRequest),
        (torch.zeros(2, WIDTH + 1), {}, RemoteProtocolError),
        (torch.zeros(2, WIDTH - 1), {}, InvalidRequest),
        (torch.zeros(2, WIDTH, 1), {"rows": [RowSlice(0, 0, 2)]}, InvalidRequest),
        (tokens(2), {"rows": [RowSlice(0, 0, 1), RowSlice(0, 1, 1)]}, InvalidRequest),
        (tokens(1), {"rows": [RowSlice(1, 0, 1)]}, InvalidRequest),
        (tokens(257), {}, ContextTooLong),
        (tokens(1), {"needs": ("telepathy",)}, UnsupportedFeature),
        (tokens(1), {"ops": (Fork(0, 200, 0),)}, InvalidRequest),
        (tokens(1), {"ops": (Drop(200),)}, InvalidRequest),
    ],
)
async def test_a_wrong_step_is_answered_and_nobody_else_notices(open_swarm, hidden, fields, error):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller, other = await swarm.caller(), await swarm.caller()
        good = await other.open(host, session=b"g" * 16)
        stream = await caller.open(host)
        said = await answer(caller, stream, hidden, **fields)
        assert isinstance(said, error if error is not UnsupportedFeature else InvalidRequest)
        if error is RemoteProtocolError:
            assert await is_ended(stream)
        else:
            assert torch.equal(await answer(caller, stream, tokens(1), 2), fake_forward(tokens(1), Span(0, 4)))
        assert torch.equal(await answer(other, good, tokens(1)), fake_forward(tokens(1), Span(0, 4)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_activations_that_are_no_numbers_end_that_session(open_swarm, value):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        stream = await caller.open(host)
        header, _ = step(tokens(1))
        await stream.send(header, [memoryview(torch.full((1, WIDTH), value).numpy()).cast("B")])
        assert isinstance(await next_answer(stream), RemoteProtocolError)
        assert await is_ended(stream)
        assert await serves_well(swarm, host)


@pytest.mark.parametrize("ops", [[[["fork"], 0, 0, 1]], [[{}]], [["fork"]], [[]], [["drop", True]], [3], [[None]]])
async def test_ops_that_are_none_end_that_session(open_swarm, ops):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        stream = await (await swarm.caller()).open(host)
        header, body = step(tokens(1))
        await stream.send(header | {"ops": ops}, body)
        assert isinstance(await next_answer(stream), RemoteProtocolError)
        assert await serves_well(swarm, host)


async def test_a_gap_is_told_with_what_is_there(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        stream = await caller.open(host, max_rows=2)
        await answer(caller, stream, tokens(3))
        said = Gap.from_header(await answer(caller, stream, tokens(1), 2, start=5))
        assert said == Gap(epoch=0, seq=2, have=((0, 3),))
        said = Gap.from_header(await answer(caller, stream, tokens(1), 3, start=3, ops=(Fork(0, 1, 4),)))
        assert said.have == ((0, 3),)
        assert torch.equal(
            await answer(caller, stream, tokens(4)[3:], 4, start=3), fake_forward(tokens(4), Span(0, 4))[3:]
        )


async def test_more_unanswered_steps_than_granted_end_that_session_only(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, step_s=1)
        caller, other = await swarm.caller(), await swarm.caller()
        good = await other.open(host, session=b"g" * 16)
        stream = await caller.open(host, max_steps=2)
        assert await is_cut_short(stream, [step(tokens(1), seq, start=seq - 1) for seq in range(1, 50)])
        assert host.server.sessions == 1
        assert torch.equal(await answer(other, good, tokens(1)), fake_forward(tokens(1), Span(0, 4)))


async def test_what_the_client_wants_back(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        stream = await caller.open(host, max_rows=2)
        one, two = tokens(5, 1), tokens(3, 2)
        rows = [RowSlice(0, 0, 5), RowSlice(1, 0, 3)]
        both = torch.cat([one, two])
        first, second = fake_forward(one, Span(0, 4)), fake_forward(two, Span(0, 4))
        assert await answer(caller, stream, both, 1, rows=rows, want="none") is None
        assert torch.equal(await answer(caller, stream, both, 2, rows=rows), torch.stack([first[-1], second[-1]]))
        assert torch.equal(await answer(caller, stream, both, 3, rows=rows, want="all"), torch.cat([first, second]))


async def test_a_step_that_comes_again_is_neither_computed_nor_answered_again(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        stream = await caller.open(host, max_rows=2)
        row = tokens(4)
        await answer(caller, stream, row[:3])
        fork = [Fork(0, 1, 2)]
        forked = await answer(caller, stream, row[3:], 2, rows=[RowSlice(1, 2, 1)], ops=fork)
        before = host.task.engine.positions_computed
        await send(stream, row[:3])
        await send(stream, row[3:], 2, rows=[RowSlice(1, 2, 1)], ops=fork)
        result = await answer(caller, stream, row[3:], 3, start=3)
        assert torch.equal(forked, fake_forward(torch.cat([row[:2], row[3:]]), Span(0, 4))[-1:])
        assert torch.equal(result, fake_forward(row, Span(0, 4))[-1:])
        assert host.task.engine.positions_computed == before + 1


async def test_a_step_without_rows_ends_a_replay_and_what_it_held_is_not_taken_again(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        stream = await caller.open(host)
        row = tokens(4)
        await send(stream, row[:3], 0, want="none")
        assert await answer(caller, stream, row[:0], 7, want="none") is None
        await send(stream, row[1:2], 7, start=1)
        assert torch.equal(await answer(caller, stream, row[3:], 8, start=3), fake_forward(row, Span(0, 4))[-1:])


async def test_a_hop_says_how_far_a_session_is_while_its_device_is_busy_and_to_its_client_alone(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, step_s=10)
        caller, stranger = await swarm.caller(), await swarm.caller()
        stream = await caller.open(host)

        async def ask(asker):
            asking = await asker.stream(host, PROGRESS_PROTOCOL)
            await asking.send(Ask(session=b"s" * 16, hop=0).to_header())
            return parse((await asking.receive()).header, PROGRESS_FROM_HOP)

        await send(stream, tokens(1))
        await trio.sleep(0.1)
        await send(stream, tokens(1), 2, start=1)
        await trio.sleep(0.1)
        assert await ask(caller) == Progress(taken=2, done=0, turns=0)
        assert (await ask(stranger)).error.code == "evicted"
        await next_answer(stream)
        assert await ask(caller) == Progress(taken=2, done=1, turns=1)


async def test_a_route_that_is_not_newer_is_refused(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        stream = await caller.open(host, epoch=3)
        said = await caller.ask(stream, Route(epoch=3))
        assert isinstance(said.error, Superseded)


async def test_a_flood_of_routes_to_nowhere_is_answered_one_by_one(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        stream = await caller.open(host)
        for epoch in range(1, 40):
            await stream.send(Route(epoch=epoch, next=NextHop(b"t", b"r")).to_header())
        while (said := await caller.hear(stream)).epoch < 39:
            assert isinstance(said, LinkDown)
        assert await serves_well(swarm, host)


# Clients that do not read.


async def pace(swarm, host, seed):
    """Seconds that a client needs for ten tokens."""
    session = await (await swarm.client()).session(host.span, max_length=64)
    row = tokens(11, seed)
    await session.step(row[:1])
    before = trio.current_time()
    for position in range(1, 11):
        await session.step(row[position : position + 1])
    session.close()
    return trio.current_time() - before


async def test_a_client_that_does_not_read_its_answers_is_held_and_costs_nobody_else_time(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, batch_tokens=1024)
        caller = await swarm.caller()
        alone = await pace(swarm, host, 1)
        stream = await caller.open(host, max_length=1024, max_steps=16)
        before = host.task.engine.positions_computed
        # 32 KiB an answer: after two of them the stream's first credit is used up.
        for seq in range(1, 13):
            await send(stream, tokens(1024, seq), seq, want="all")
            await trio.sleep(0.2)
        computed = host.task.engine.positions_computed - before
        assert computed <= 6 * 1024
        assert await pace(swarm, host, 2) <= 1.1 * alone
        # It reads at last, and gets all that it asked for in so far as it was granted.
        for seq in range(1, 13):
            assert torch.equal(await next_answer(stream), fake_forward(tokens(1024, seq), Span(0, 4)))


async def test_refusals_that_nobody_reads_do_not_pile_up(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        caller = await swarm.caller()
        stream = await caller.open(host)
        assert await is_cut_short(stream, [step(tokens(1), needs=("x" * 64,) * 20)] * 5000)
        assert host.server.sessions == 0
        assert await serves_well(swarm, host)


async def test_answers_that_an_evicted_client_never_read_are_dropped(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, batch_tokens=1024)
        caller = await swarm.caller()
        stream = await caller.open(host, max_length=1024)
        for seq in range(1, 9):
            await send(stream, tokens(1024, seq), seq, want="all")
        await trio.sleep(IDLE_S + 20)
        assert host.server.sessions == 0
        connection = host.connections.live[caller.identity.peer_id]
        assert "streams=0" in repr(connection)


# Results that cannot be right.


class NanEngine(FakeEngine):
    """Fails for a session that begins a row with the number 13."""

    def run(self, batch):
        output = super().run(batch)
        finite = tuple(
            not bool((piece.step.hidden[:, 0] == 13.0).any()) and good
            for piece, good in zip(batch.pieces, output.finite, strict=True)
        )
        return BatchOutput(output.hidden, finite)


def poisoned(count):
    row = tokens(count)
    row[0, 0] = 13.0
    return row


async def test_a_result_that_is_not_finite_is_told_to_its_session_alone(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, engine_type=NanEngine)
        caller, other = await swarm.caller(), await swarm.caller()
        stream = await caller.open(host)
        good = await other.open(host, session=b"g" * 16)
        row = tokens(2)
        row[:, 0] = 1.0
        await send(stream, poisoned(2))
        await send(stream, row[:1], 2, start=2)
        assert torch.equal(await answer(other, good, row), fake_forward(row, Span(0, 4))[-1:])
        assert isinstance(await next_answer(stream), BadResult)
        # What was built on it falls with it; the session goes on from where the bad step began.
        assert isinstance(await next_answer(stream), BadResult)
        assert torch.equal(await answer(caller, stream, row, 3), fake_forward(row, Span(0, 4))[-1:])


async def test_a_client_leaves_a_peer_whose_results_are_not_finite(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        await swarm.serve(0, 3)
        bad = await swarm.serve(3, 6, engine_type=NanEngine)
        await swarm.serve(6, 9)
        client = await swarm.client()
        session = await client.session(Span(0, 9))
        row = next(row for row in (tokens(4, seed) for seed in range(2000)) if _reaches_thirteen(row))
        await swarm.serve(3, 6)
        client.finder.track_record.failed(swarm.hosts[-1].peer_id)
        assert torch.equal(await session.step(row, want="all"), whole_forward(row, 9))
        assert bad.peer_id in client.finder.failures
        assert bad.peer_id not in [hop.peer for hop in session.chain]


def _reaches_thirteen(row):
    return bool((fake_forward(row, Span(0, 3))[:, 0] == 13.0).any())


class LoudEngine(FakeEngine):
    """Finite in the engine's own float32, beyond what float16 holds."""

    def run(self, batch):
        output = super().run(batch)
        return BatchOutput(tuple(part * 1e5 for part in output.hidden), output.finite)


@pytest.mark.parametrize("fields", [{"dtype": "float16"}, {"codec": "int8", "dtype": "float16"}])
async def test_a_result_that_the_sessions_dtype_cannot_hold_is_the_callers_fault(open_swarm, fields):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, engine_type=LoudEngine)
        caller, other = await swarm.caller(), await swarm.caller()
        stream = await caller.open(host, **fields)
        assert isinstance(await answer(caller, stream, tokens(2)), UnsupportedFeature)
        good = await other.open(host, session=b"g" * 16)
        assert (await answer(other, good, tokens(2))).shape == (1, WIDTH)


async def test_a_replay_that_the_dtype_cannot_hold_is_a_link_that_fails(open_swarm):
    async with open_swarm() as swarm:
        host, after = await swarm.serve(0, 4, engine_type=LoudEngine), await swarm.serve(4, 8)
        caller = await swarm.caller()
        await caller.open(after, hop=1)
        stream = await caller.open(host, dtype="float16", codec="int8", next=caller.next_hop(host, after))
        assert isinstance(await answer(caller, stream, tokens(2)), UnsupportedFeature)
        said = await caller.ask(stream, Route(epoch=1, next=caller.next_hop(host, after, epoch=1)))
        assert isinstance(said, LinkDown)
        assert await serves_well(swarm, after)
