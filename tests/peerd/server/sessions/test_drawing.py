"""A last hop that draws tokens: what a client may ask of it, in which order, and what is refused."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import torch
import trio

from peerd.protocol.encoding.tensors import encode_tensor
from peerd.protocol.errors import InvalidRequest, RemoteProtocolError, UnsupportedFeature
from peerd.protocol.messages.drawing import Draw, Sampling, pack_ids, unpack_drawn
from peerd.protocol.messages.session import Failure, Output, Step
from peerd.protocol.rows import RowSlice
from peerd.server.served_head import ServedHead
from peerd.server.sessions.drawing import MAX_UNUSED_DRAWS
from tests.fakes.byte_head import VOCABULARY, WIDTH, RandomHead

GREEDY = Sampling()
PENALTY = Sampling(repetition_penalty=1.5)


class Drawer:
    """A client that speaks to the last hop by hand."""

    def __init__(self, caller, host, stream) -> None:
        self.caller, self.host, self.stream = caller, host, stream

    async def step(self, seq: int, start: int, count: int = 1, want: str = "all", row: int = 0) -> None:
        hidden = torch.arange(start, start + count).float()[:, None].expand(-1, WIDTH).contiguous()
        header, body = encode_tensor(hidden)
        rows = (RowSlice(row, start, count),)
        step = Step(epoch=0, seq=seq, rows=rows, tensor=header.to_fields(), want=want)
        await self.stream.send(step.to_header(), body)

    async def say(self, message, ids=()) -> None:
        await self.stream.send(message.to_header(), [memoryview(pack_ids(ids))] if ids else [])

    async def hear(self) -> tuple[int, list[int]]:
        """An answer's number and its tokens. Raises the error that came in its place."""
        raw = await self.stream.receive(max_body=2**20)
        if raw.header["type"] == "error":
            raise Failure.from_header(raw.header).error
        output = Output.from_header(raw.header)
        count = raw.body.nbytes // 4
        return output.seq, [pairs[0][0] for pairs in unpack_drawn(raw.body, count, None, VOCABULARY)]


@pytest.fixture
def open_drawer(open_swarm):
    @asynccontextmanager
    async def open_it(**fields):
        async with open_swarm() as swarm:
            host = await swarm.serve(0, 3, head=ServedHead(RandomHead()))
            caller = await swarm.caller()
            yield Drawer(caller, host, await caller.open(host, needs=("head",), **fields))

    return open_it


async def test_a_step_and_how_to_draw_from_it_may_come_in_any_order(open_drawer):
    async with open_drawer() as drawer:
        await drawer.step(1, 0, 3)
        await trio.sleep(1)
        await drawer.say(GREEDY)
        await drawer.say(Draw(seq=1))
        seq, first = await drawer.hear()
        assert (seq, len(first)) == (1, 3)
        await drawer.say(Draw(seq=2))
        await trio.sleep(1)
        await drawer.step(2, 3)
        seq, second = await drawer.hear()
        assert (seq, len(second)) == (2, 1)


async def test_steps_that_the_client_no_longer_waits_for_are_passed_over(open_drawer):
    async with open_drawer() as drawer:
        for seq in range(1, 4):
            await drawer.step(seq, seq - 1)
        await drawer.say(GREEDY)
        await drawer.say(Draw(seq=3))
        assert (await drawer.hear())[0] == 3


async def test_a_step_of_which_nothing_is_wanted_is_answered_unasked(open_drawer):
    async with open_drawer() as drawer:
        await drawer.step(1, 0, 3, want="none")
        assert await drawer.hear() == (1, [])


async def test_the_context_is_what_was_said_last_of_each_position(open_drawer):
    async with open_drawer(max_rollback=8) as drawer:
        await drawer.say(PENALTY)
        for seq, ids in enumerate(([5, 6, 7], [9, 9]), 1):
            start = 0 if seq == 1 else 1
            await drawer.say(Draw(seq=seq, context=(RowSlice(0, start, len(ids)),)), ids)
            await drawer.step(seq, start, len(ids))
            assert (await drawer.hear())[0] == seq


@pytest.mark.parametrize(
    ("message", "ids", "reason"),
    [
        (Draw(seq=1), (), "context of row 0 has 0 tokens"),
        (Draw(seq=1, context=(RowSlice(0, 1, 1),)), (5,), "has 0 tokens, not 1"),
        (Draw(seq=1, context=(RowSlice(0, 0, 2),)), (5, VOCABULARY), f"token {VOCABULARY}"),
        (Draw(seq=1, context=(RowSlice(0, 0, 300),)), (1,) * 300, "more than the 256 positions"),
        (Draw(seq=1, rows=(0, 1)), (), "2 positions are wanted"),
    ],
    ids=["no-context", "a-gap", "no-token", "too-much", "many-rows-of-many-positions"],
)
async def test_what_nothing_can_be_drawn_from_fails_its_step_alone(open_drawer, message, ids, reason):
    async with open_drawer() as drawer:
        await drawer.say(PENALTY)
        await drawer.step(1, 0, 2)
        await drawer.say(message, ids)
        with pytest.raises(InvalidRequest, match=reason):
            await drawer.hear()
        await drawer.say(GREEDY)
        await drawer.say(Draw(seq=2))
        await drawer.step(2, 2)
        assert (await drawer.hear())[0] == 2


async def test_more_tokens_than_a_step_may_have_drawn_are_refused(open_drawer):
    async with open_drawer(max_length=1024) as drawer:
        await drawer.say(GREEDY)
        await drawer.step(1, 0, 513)
        await drawer.say(Draw(seq=1))
        with pytest.raises(InvalidRequest, match="513 tokens"):
            await drawer.hear()


async def test_impossible_parameters_fail_a_step(open_drawer):
    async with open_drawer() as drawer:
        await drawer.say(Sampling(top_p=0.0))
        await drawer.say(Draw(seq=1))
        await drawer.step(1, 0)
        with pytest.raises(InvalidRequest, match="top_p"):
            await drawer.hear()


async def test_draws_without_steps_end_the_session(open_drawer):
    async with open_drawer() as drawer:
        for seq in range(1, MAX_UNUSED_DRAWS + 2):
            await drawer.say(Draw(seq=seq))
        with pytest.raises(RemoteProtocolError, match="steps that did not come"):
            await drawer.hear()


async def test_more_context_than_the_session_has_positions_does_not_wait_for_steps(open_drawer):
    async with open_drawer() as drawer:
        positions = drawer.host.server.spans[0].max_length
        await drawer.say(Draw(seq=1, context=(RowSlice(0, 0, 2 * positions + 1),)), [1] * (2 * positions + 1))
        with pytest.raises(RemoteProtocolError, match="more context than the session has positions"):
            await drawer.hear()


async def test_a_body_that_does_not_fit_its_slices_ends_the_session(open_drawer):
    async with open_drawer() as drawer:
        await drawer.say(Draw(seq=1, context=(RowSlice(0, 0, 3),)), (1, 2))
        with pytest.raises(RemoteProtocolError, match="8 bytes of context instead of 12"):
            await drawer.hear()


async def test_a_hop_without_the_head_refuses_to_draw(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 3)
        caller = await swarm.caller()
        assert isinstance(await caller.refused(host, needs=("head",)), UnsupportedFeature)
        stream = await caller.open(host)
        said = await caller.ask(stream, Draw(seq=1))
        assert isinstance(said, Failure)
        assert isinstance(said.error, RemoteProtocolError)


async def test_only_the_last_hop_of_the_last_block_draws(open_swarm):
    async with open_swarm() as swarm:
        host, other = await swarm.serve(0, 3, head=ServedHead(RandomHead())), await swarm.serve(3, 6)
        caller = await swarm.caller()
        for fields in ({"next": caller.next_hop(host, other)}, {"end": 2}):
            assert isinstance(await caller.refused(host, needs=("head",), **fields), InvalidRequest)


async def test_a_session_whose_client_never_says_what_to_draw_is_unused(open_drawer):
    async with open_drawer() as drawer:
        await drawer.step(1, 0)
        await trio.sleep(20)
        (session,) = drawer.host.server._sessions
        assert session.unused_s() > 19
        assert session.progress.taken == 1
        assert session.progress.done == 0
