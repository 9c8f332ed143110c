"""Sessions that outlive their answers: the same tokens as without, whatever happened to them meanwhile."""

from __future__ import annotations

from contextlib import aclosing, asynccontextmanager
from types import SimpleNamespace

import pytest
import torch
import trio
from transformers import GenerationConfig

from peerd.client.blocks import ModelFacts
from peerd.client.decoding import Decoding
from peerd.client.model import SwarmModel
from peerd.client.session.kept_sessions import KEPT_S, LEAST_SHARED, KeptSessions, Shape, roomy_length
from peerd.client.speculation.speculation import MOST_DRAFTED
from peerd.protocol.span import Span

WIDTH, BLOCKS, MAX_LENGTH = 8, 9, 1024
PROMPT = [number * 7 % 256 for number in range(40)]
MORE = [9, 9, 8, 7]


class Head:
    """Bytes in, and logits that a whole hidden state decides."""

    vocab_size = 257

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self._in = torch.randn(257, WIDTH, generator=generator)
        self._out = torch.randn(WIDTH, 257, generator=generator)

    def embed(self, token_ids, start=0):
        return self._in[torch.tensor(list(token_ids), dtype=torch.long)]

    async def in_thread(self, function, *arguments, limiter=None):
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    async def logits(self, hidden, most=None):
        await trio.lowlevel.checkpoint()
        return torch.nn.functional.layer_norm(hidden.float(), (WIDTH,)) @ self._out


@pytest.fixture
def open_model(open_swarm, byte_tokenizer):
    """`async with open_model() as (model, swarm):` three servers, and a client's model that keeps no sessions yet."""

    @asynccontextmanager
    async def open_it(**facts):
        async with open_swarm() as swarm:
            for start in range(0, BLOCKS, 3):
                await swarm.serve(start, start + 3)
            client = await swarm.client()
            facts = {"limits_rollback": False} | facts
            known = ModelFacts("bytes", bytes(range(32)), BLOCKS, WIDTH, MAX_LENGTH, "float32", **facts)
            config = GenerationConfig(eos_token_id=256)
            yield SwarmModel(known, Head(), byte_tokenizer, config, client.finder, client.opener, client.tasks), swarm

    return open_it


async def answer(model, prompt, *, count=12, rows=1, adapter=None, stop_after=None):
    """The tokens of an answer, how many positions it found computed, and its session."""
    params = model.sampling_params(temperature=1.0, seed=3, max_new_tokens=count, eos_token_ids=[])
    speculation = model.speculation
    decoding = Decoding(model, prompt, params, rows=rows, adapter=adapter, speculation=speculation)
    found = []
    async with aclosing(decoding.tokens()) as tokens:
        async for token in tokens:
            found.append(token.id)
            if len(found) == stop_after:
                break
    return SimpleNamespace(ids=found, cached=decoding.cached, session=decoding.session)


async def fresh(model, prompt):
    """The tokens of an answer by a session of its own."""
    kept, model.kept = model.kept, None
    try:
        return (await answer(model, prompt)).ids
    finally:
        model.kept = kept


async def test_the_next_turn_computes_only_what_is_new(open_model):
    async with open_model() as (model, swarm):
        model.keep_sessions(4096)
        first = await answer(model, PROMPT)
        assert first.cached == 0
        prompt = [*PROMPT, *first.ids, *MORE]
        second = await answer(model, prompt)
        # All but the last token of the answer, which was drawn and never sent.
        assert second.cached == len(PROMPT) + len(first.ids) - 1
        assert second.session is first.session
        third = await answer(model, [*prompt, *second.ids, *MORE])
        assert third.cached == len(prompt) + len(second.ids) - 1
        assert second.ids == await fresh(model, prompt)
        assert third.ids == await fresh(model, [*prompt, *second.ids, *MORE])
        await trio.sleep(1)
        assert [host.server.sessions for host in swarm.hosts] == [1, 1, 1]


@pytest.mark.parametrize("at", [LEAST_SHARED, 36, 45])
async def test_an_edited_turn_cuts_the_session_where_it_differs(open_model, at):
    async with open_model() as (model, _):
        model.keep_sessions(4096)
        first = await answer(model, PROMPT)
        edited = [*[*PROMPT, *first.ids][:at], 255, 254, 253]
        second = await answer(model, edited)
        assert (second.cached, second.session is first.session) == (at, True)
        assert second.ids == await fresh(model, edited)


async def test_a_model_with_windows_is_cut_only_as_far_as_its_blocks_remember(open_model):
    async with open_model(limits_rollback=True) as (model, _):
        model.keep_sessions(4096)
        first = await answer(model, PROMPT, count=60)
        far, near = ([*[*PROMPT, *first.ids][:at], 1, 2] for at in (50, 80))
        second = await answer(model, far)
        assert (second.cached, second.session is first.session) == (0, False)
        assert second.ids == await fresh(model, far)
        third = await answer(model, near)
        assert (third.cached, third.session is first.session) == (80, True)
        assert third.ids == await fresh(model, near)


async def test_the_same_prompt_again_computes_its_last_position(open_model):
    async with open_model() as (model, _):
        model.keep_sessions(4096)
        first, second = await answer(model, PROMPT), await answer(model, PROMPT)
        assert second.cached == len(PROMPT) - 1
        assert second.ids == first.ids


async def test_a_prompt_that_begins_in_another_way_gets_a_session_of_its_own(open_model):
    async with open_model() as (model, _):
        model.keep_sessions(4096)
        first = await answer(model, PROMPT)
        other = [*PROMPT[: LEAST_SHARED - 1], *range(100, 120)]
        second = await answer(model, other)
        assert (second.cached, second.session is first.session) == (0, False)
        assert len(model.kept) == 2


@pytest.mark.parametrize("loss", ["dies", "evicted"])
async def test_a_hop_that_is_lost_meanwhile_changes_no_token(open_model, loss):
    async with open_model() as (model, swarm):
        model.keep_sessions(4096)
        first = await answer(model, PROMPT)
        peer = first.session.chain[1].peer
        host = next(host for host in swarm.hosts if host.peer_id == peer)
        await swarm.serve(3, 6)
        if loss == "dies":
            swarm.kill(host)
        else:
            for session in host.server._sessions.on(host.task):
                session.close()
        await trio.sleep(1)
        prompt = [*PROMPT, *first.ids, *MORE]
        second = await answer(model, prompt)
        assert second.ids == await fresh(model, prompt)


async def test_an_answer_that_was_stopped_is_taken_up_too(open_model):
    async with open_model() as (model, _):
        model.keep_sessions(4096)
        first = await answer(model, PROMPT, stop_after=5)
        prompt = [*PROMPT, *first.ids, *MORE]
        second = await answer(model, prompt)
        assert second.cached == len(PROMPT) + 4
        assert second.ids == await fresh(model, prompt)


async def test_two_answers_at_once_never_share_a_session(open_model):
    async with open_model() as (model, _):
        model.keep_sessions(4096)
        first = await answer(model, PROMPT)
        prompts = [[*PROMPT, *first.ids, number] for number in range(3)]
        found = {}

        async def run(number):
            found[number] = await answer(model, prompts[number])

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(run, number)
        assert len({found[number].session for number in range(3)}) == 3
        assert sorted(found[number].cached > 0 for number in range(3)) == [False, False, True]
        for number in range(3):
            assert found[number].ids == await fresh(model, prompts[number])


async def test_kept_sessions_end_after_a_time_and_beyond_their_budget(open_model):
    async with open_model() as (model, swarm):
        model.keep_sessions(2200)
        for first in (0, 100, 200):
            await answer(model, [first, *PROMPT])
        # Each takes all 1024 positions of the model, for the next turns.
        assert (len(model.kept), model.kept.positions) == (2, 2048)
        await trio.sleep(1)
        assert [host.server.sessions for host in swarm.hosts] == [2, 2, 2]
        await trio.sleep(KEPT_S)
        assert len(model.kept) == 0
        assert [host.server.sessions for host in swarm.hosts] == [0, 0, 0]


async def test_a_chat_that_outgrows_its_session_gets_a_larger_one(open_model):
    async with open_model() as (model, _):
        model.keep_sessions(400)
        first = await answer(model, PROMPT)
        prompt = [*PROMPT, *first.ids, *[number % 256 for number in range(500)]]
        model.kept.budget = 4096
        second = await answer(model, prompt)
        assert (second.cached, first.session.closed) == (0, True)
        assert (len(model.kept), model.kept.positions) == (1, 1024)
        assert second.ids == await fresh(model, prompt)


@pytest.mark.parametrize("case", ["rows", "too large", "ropes"])
async def test_what_cannot_serve_another_answer_is_not_kept(open_model, case):
    async with open_model(ropes_follow_length=case == "ropes") as (model, _):
        model.keep_sessions(50 if case == "too large" else 4096)
        await answer(model, PROMPT, rows=2 if case == "rows" else 1)
        assert len(model.kept) == 0


def test_a_session_serves_what_needs_no_more_than_it_has():
    has = Shape(100, 31)
    assert has.serves(Shape(100, 31))
    assert has.serves(Shape(40, 0))
    assert not has.serves(Shape(101, 0))
    assert not has.serves(Shape(40, 32))


def offer(span, free):
    return SimpleNamespace(span=Span.parse(span), record=SimpleNamespace(free_tokens=free))


@pytest.mark.parametrize(
    ("offers", "length"),
    [
        ([offer("0:9", 6096)], 3048),
        ([offer("0:9", 6095)], 2024),
        ([offer("0:9", 2512)], 1256),
        ([offer("0:9", 2511)], 1000),
        ([offer("0:3", 9000), offer("3:9", 100)], 1000),
        ([offer("0:3", 9000), offer("3:9", 100), offer("2:9", 9000)], 3048),
    ],
)
def test_room_for_the_next_turns_is_asked_for_where_plenty_is_free(offers, length):
    assert roomy_length(1000, 4096, offers) == length
    assert roomy_length(1000, 2000, offers) <= 2000
    assert roomy_length(1000, 1200, offers) == 1000
    assert roomy_length(1000, 800, offers) == 1000


def test_a_long_chat_asks_for_twice_its_length():
    assert roomy_length(5000, 32_768, [offer("0:9", 65_536)]) == 10_000


async def test_a_session_that_was_closed_is_not_kept():
    async with trio.open_nursery() as nursery:
        kept = KeptSessions(1000, nursery)
        closed = []
        session = SimpleNamespace(closed=True, close=lambda: closed.append(1))
        kept.keep(session, range(50), Shape(100, MOST_DRAFTED))
        assert (len(kept), closed) == (0, [1])
