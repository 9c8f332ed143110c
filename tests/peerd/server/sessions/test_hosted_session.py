"""Steps of a hosted session: wrong ones, repeated ones, and clients that do not read."""

import pytest
import torch
import trio

from peerd.protocol.encoding.schema import parse
from peerd.protocol.errors import (
    ContextTooLong,
    InvalidRequest,
    RemoteProtocolError,
    Superseded,
    UnsupportedFeature,
)
from peerd.protocol.messages.session import (
    PROGRESS_FROM_HOP,
    PROGRESS_PROTOCOL,
    Ask,
    Gap,
    LinkDown,
    NextHop,
    Progress,
    Route,
)
from peerd.protocol.rows import Drop, Fork, RowSlice
from peerd.protocol.span import Span
from peerd.server.sessions.evictions import IDLE_S
from peerd.testing.fake_engine import fake_forward
from tests.fakes.rude_clients import WIDTH, answer, is_cut_short, is_ended, next_answer, send, serves_well, step, tokens


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
