"""Generation over an in-memory swarm, with a head and a tokenizer of bytes, so that every token can be predicted."""

from __future__ import annotations

import copy
from contextlib import aclosing, asynccontextmanager

import pytest
import torch
import trio
from transformers import GenerationConfig

from peerd.client.blocks import RESUME_S, ModelFacts
from peerd.client.model import SwarmModel
from peerd.protocol.errors import ContextTooLong, InvalidRequest, NoChain

WIDTH = 8
BLOCKS = 9
MAX_LENGTH = 1024
END = 256


class ByteHead:
    """Embeds a token as its number, eight times; the likeliest next token is the first value that comes back."""

    def embed(self, token_ids, start=0):
        return torch.tensor(token_ids).float()[:, None].expand(-1, WIDTH).clone()

    async def logits(self, hidden, most=None):
        await trio.lowlevel.checkpoint()
        return torch.nn.functional.one_hot(hidden[:, 0].long(), END + 1).float()

    async def in_thread(self, function, *arguments, limiter=None):
        await trio.lowlevel.checkpoint()
        return function(*arguments)


class PositionHead(ByteHead):
    """Embeds a token by its position too, as models with a table of positions do."""

    def embed(self, token_ids, start=0):
        return super().embed(token_ids) + 7 * torch.arange(start, start + len(token_ids))[:, None]


class ScriptedHead(ByteHead):
    """Says the given tokens, whatever comes back."""

    def __init__(self, token_ids):
        self._script = iter(token_ids)

    async def logits(self, hidden, most=None):
        await trio.lowlevel.checkpoint()
        return torch.nn.functional.one_hot(torch.tensor([next(self._script)]), END + 1).float()


@pytest.fixture
def open_model(open_swarm, byte_tokenizer):
    """`async with open_model() as (model, swarm):` three servers and a client's model, `head` as given."""

    @asynccontextmanager
    async def open_it(head=None, **more):
        async with open_swarm() as swarm:
            for start in range(0, BLOCKS, 3):
                await swarm.serve(start, start + 3)
            client = await swarm.client()
            facts = ModelFacts("bytes", bytes(range(32)), BLOCKS, WIDTH, MAX_LENGTH, "float32", **more)
            config = GenerationConfig(eos_token_id=END)
            model = SwarmModel(
                facts, head or ByteHead(), byte_tokenizer, config, client.finder, client.opener, client.tasks
            )
            if isinstance(head, ScriptedHead):
                # It counts calls, not positions.
                model.speculation = None
            yield model, swarm

    return open_it


def foretold(whole_forward, prompt, count, head=None):
    """What greedy generation says, computed without cache, session or swarm."""
    row = list(prompt)
    for _ in range(count):
        row.append(int(whole_forward((head or ByteHead()).embed(row), BLOCKS)[-1, 0]))
    return row[len(prompt) :]


async def text_pieces(generation):
    return [token.text async for token in generation]


async def test_tokens_text_and_figures_of_an_answer(open_model, whole_forward):
    async with open_model() as (model, swarm):
        generation = model.generate([1, 2, 3], max_new_tokens=20)
        tokens = [token async for token in generation]
        expected = foretold(whole_forward, [1, 2, 3], 20)
        assert [token.id for token in tokens] == generation.token_ids == expected
        assert [token.position for token in tokens] == list(range(3, 23))
        assert "".join(token.text for token in tokens) == generation.text == model.decode(expected)
        assert [(hop.span.start, hop.span.end) for hop in generation.chain] == [(0, 3), (3, 6), (6, 9)]
        # A step takes 30 ms of computing and 20 ms on the way.
        assert generation.tokens_per_second == pytest.approx(20, rel=0.05)
        assert generation.time_to_first_token_s is not None
        assert generation.time_to_first_token_s < 0.5
        assert all(host.task.engine.positions_computed == 22 for host in swarm.hosts)


async def test_an_answer_is_computed_again_once_where_its_text_grows_past_a_change_of_ropes(open_model, whole_forward):
    async with open_model(ropes_follow_length=True, ropes_change_at=10) as (model, swarm):
        generation = model.generate([1, 2, 3], max_new_tokens=20, eos_token_ids=())
        assert [token.id async for token in generation] == foretold(whole_forward, [1, 2, 3], 20)
        # 10 positions, and then the whole text.
        assert all(host.task.engine.positions_computed == 10 + 22 for host in swarm.hosts)


@pytest.mark.parametrize("max_new_tokens", [5, 200])
async def test_a_session_declares_its_prompt_and_not_how_long_the_answer_may_become(
    open_model, monkeypatch, max_new_tokens
):
    async with open_model(ropes_follow_length=True) as (model, _):
        asked, start = [], model.start_session
        monkeypatch.setattr(model, "start_session", lambda **wanted: asked.append(wanted) or start(**wanted))
        async with aclosing(model.generate([1, 2, 3], max_new_tokens=max_new_tokens).tokens()) as tokens:
            await anext(tokens)
        assert [wanted["prompt_length"] for wanted in asked] == [3]


async def test_a_death_in_mid_answer_changes_no_token(open_model, whole_forward):
    async with open_model() as (model, swarm):
        await swarm.serve(3, 6)
        generation = model.generate([5, 6], max_new_tokens=30)
        async for token in generation:
            if token.position == 12:
                peer = generation.chain[1].peer
                swarm.kill(next(host for host in swarm.hosts if host.peer_id == peer))
        assert generation.token_ids == foretold(whole_forward, [5, 6], 30)
        assert generation.failovers == 1


async def test_each_token_is_embedded_for_its_own_position_also_after_a_death(open_model, whole_forward):
    async with open_model(PositionHead()) as (model, swarm):
        generation = model.generate([5, 6], max_new_tokens=30, eos_token_ids=())
        async for token in generation:
            if token.position == 12:
                swarm.kill(next(host for host in swarm.hosts if host.peer_id == generation.chain[1].peer))
                await swarm.serve(3, 6)
        assert generation.token_ids == foretold(whole_forward, [5, 6], 30, PositionHead())
        assert generation.token_ids != foretold(whole_forward, [5, 6], 30)


async def test_the_end_of_sequence_ends_the_answer_and_has_no_text(open_model):
    async with open_model(ScriptedHead([*b"yes", END, *b"no"])) as (model, _):
        generation = model.generate("?", max_new_tokens=10)
        assert await text_pieces(generation) == ["y", "e", "s", ""]
        assert generation.token_ids == [*b"yes", END]
        assert generation.text == "yes"


async def test_callers_may_name_other_ends_or_none(open_model):
    async with open_model(ScriptedHead([*b"yes", END, *b"no"])) as (model, _):
        generation = model.generate("?", max_new_tokens=10, eos_token_ids=[ord("e")])
        assert await text_pieces(generation) == ["y", "e"]
    async with open_model(ScriptedHead([*b"yes", END, *b"no"])) as (model, _):
        generation = model.generate("?", max_new_tokens=6, eos_token_ids=[])
        assert "".join(await text_pieces(generation)) == "yesno"


@pytest.mark.parametrize("count", [1, 2, 7])
async def test_no_more_tokens_than_asked_for_and_no_step_for_the_last(open_model, count):
    async with open_model() as (model, swarm):
        generation = model.generate([1, 2, 3], max_new_tokens=count)
        assert len(await text_pieces(generation)) == count
        assert all(host.task.engine.positions_computed == 3 + count - 1 for host in swarm.hosts)


async def test_characters_come_whole_and_are_never_taken_back(open_model):
    said = "Größe: 10 €, 👩‍🚀 und 日本語."
    async with open_model(ScriptedHead([*said.encode(), END])) as (model, _):
        generation = model.generate("?", max_new_tokens=100)
        pieces = await text_pieces(generation)
        assert "".join(pieces) == generation.text == said
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
        # The text stands with its last byte, not before.
        assert pieces[2:4] == ["", "ö"]


async def test_half_a_character_at_the_end_is_shown_as_such(open_model):
    async with open_model(ScriptedHead("ab€".encode())) as (model, _):
        generation = model.generate("?", max_new_tokens=4)
        assert await text_pieces(generation) == ["a", "b", "", "\N{REPLACEMENT CHARACTER}"]


async def test_bytes_that_are_no_text_hold_nothing_back_for_long(open_model):
    async with open_model(ScriptedHead([0xFF, *b"abc", END])) as (model, _):
        generation = model.generate("?", max_new_tokens=10)
        assert await text_pieces(generation) == ["", "\N{REPLACEMENT CHARACTER}a", "b", "c", ""]


@pytest.mark.parametrize(("prompt", "more"), [(1000, 25), (1025, 1), (5, 1020)])
async def test_an_answer_that_cannot_fit_is_refused_before_work_starts(open_model, prompt, more):
    async with open_model() as (model, swarm):
        with pytest.raises(ContextTooLong, match=f"{prompt + more} positions"):
            await text_pieces(model.generate([1] * prompt, max_new_tokens=more))
        assert all(host.task.engine.positions_computed == 0 for host in swarm.hosts)
        assert all(host.server.sessions == 0 for host in swarm.hosts)


async def test_an_answer_that_just_fits_is_given(open_model):
    async with open_model() as (model, _):
        assert len(await text_pieces(model.generate([1] * 1020, max_new_tokens=4))) == 4


async def test_leaving_early_frees_what_the_servers_hold(open_model):
    async with open_model() as (model, swarm):
        async with aclosing(model.generate("?", max_new_tokens=100).tokens()) as tokens:
            await anext(tokens)
            assert all(host.server.sessions == 1 for host in swarm.hosts)
        await trio.sleep(0.1)
        assert all(host.server.sessions == 0 for host in swarm.hosts)
        assert all(host.task.engine.free_tokens == 4096 for host in swarm.hosts)


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.05, 0.1, 0.5])
async def test_cancelling_frees_what_the_servers_hold(open_model, after_s):
    async with open_model() as (model, swarm):
        with trio.move_on_after(after_s):
            await text_pieces(model.generate("?", max_new_tokens=100))
        await trio.sleep(0.1)
        assert all(host.server.sessions == 0 for host in swarm.hosts)
        assert all(host.task.engine.free_tokens == 4096 for host in swarm.hosts)


async def test_an_answer_is_iterated_over_once(open_model, whole_forward):
    """A second time would mix two answers' figures."""
    async with open_model() as (model, _):
        generation = model.generate([7, 8], max_new_tokens=5)
        await text_pieces(generation)
        with pytest.raises(RuntimeError, match="once"):
            await text_pieces(generation)
        assert generation.token_ids == foretold(whole_forward, [7, 8], 5)


@pytest.mark.parametrize("tokens_before", [0, 4])
async def test_an_answer_without_servers_goes_on_once_a_server_comes(open_model, whole_forward, tokens_before):
    async with open_model() as (model, swarm):
        generation = model.generate([5, 6, 7], temperature=0, max_new_tokens=10)
        tokens = aiter(generation)
        for _ in range(tokens_before):
            await anext(tokens)
        swarm.kill(swarm.hosts[1])
        with pytest.raises(NoChain, match="3:6"):
            await anext(tokens)
        assert len(generation.token_ids) == tokens_before
        last = swarm.hosts[2].task.engine
        before = last.positions_computed
        await swarm.serve(3, 6)
        async for _ in generation:
            pass
        assert generation.token_ids == foretold(whole_forward, [5, 6, 7], 10)
        if tokens_before:
            # The others had the prompt still, and computed only what was new and what had failed.
            assert last.positions_computed - before <= 10 - tokens_before + 1
        with pytest.raises(RuntimeError, match="once"):
            await anext(aiter(generation))
        await trio.sleep(1)
        assert all(host.server.sessions == 0 for host in swarm.hosts if host.online)


async def test_an_answer_to_which_its_caller_comes_back_late_is_computed_anew_and_goes_on(open_model, whole_forward):
    async with open_model() as (model, swarm):
        generation = model.generate([5, 6, 7], temperature=0, max_new_tokens=10)
        tokens = aiter(generation)
        await anext(tokens)
        swarm.kill(swarm.hosts[1])
        with pytest.raises(NoChain):
            await anext(tokens)
        await trio.sleep(400)
        assert all(host.server.sessions == 0 for host in swarm.hosts if host.online)
        await swarm.serve(3, 6)
        async for _ in generation:
            pass
        assert generation.token_ids == foretold(whole_forward, [5, 6, 7], 10)


async def test_an_answer_that_is_going_on_when_its_time_to_come_back_ends_is_not_cut_off(open_model, whole_forward):
    async with open_model() as (model, swarm):
        generation = model.generate([5, 6, 7], temperature=0, max_new_tokens=10)
        tokens = aiter(generation)
        await anext(tokens)
        swarm.kill(swarm.hosts[1])
        with pytest.raises(NoChain):
            await anext(tokens)
        await trio.sleep(RESUME_S - 1)
        async with trio.open_nursery() as nursery:

            async def serve_later() -> None:
                await trio.sleep(2)
                await swarm.serve(3, 6)

            nursery.start_soon(serve_later)
            async for _ in generation:
                pass
        assert generation.token_ids == foretold(whole_forward, [5, 6, 7], 10)


async def test_sampling_depends_on_the_seed_alone(open_model):
    async with open_model() as (model, _):
        answers = []
        for seed in (3, 3, 4):
            generation = model.generate("?", temperature=5.0, top_k=0, seed=seed, max_new_tokens=20, eos_token_ids=[])
            await text_pieces(generation)
            answers.append(generation.token_ids)
        assert answers[0] == answers[1] != answers[2]


async def test_blocks_that_nobody_serves_are_named(open_model):
    async with open_model() as (model, swarm):
        swarm.kill(swarm.hosts[1])
        with pytest.raises(NoChain, match="3:6") as caught:
            await text_pieces(model.generate("?", max_new_tokens=3))
        assert caught.value.missing == ((3, 6),)


async def test_prompts_without_tokens_are_refused(open_model):
    async with open_model() as (model, _):
        with pytest.raises(InvalidRequest, match="empty"):
            model.generate("")
        with pytest.raises(InvalidRequest, match="empty"):
            model.generate([])


async def test_chat_needs_a_template(open_model):
    async with open_model() as (model, _):
        with pytest.raises(InvalidRequest, match="no chat template"):
            model.generate("?", chat=True)


async def test_chat_prompts_are_written_as_the_template_says(open_model):
    async with open_model() as (model, _):
        model.tokenizer = copy.deepcopy(model.tokenizer)
        turns = "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% endfor %}"
        model.tokenizer.chat_template = turns + "{% if add_generation_prompt %}[a]{% endif %}"
        assert bytes(model.encode("hé", chat=True)) == "[user]hé[a]".encode()
