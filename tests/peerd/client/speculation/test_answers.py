"""Answers with guesses, over an in-memory swarm: the same tokens as without, whatever is guessed or breaks."""

from __future__ import annotations

import itertools
import json
import random
from contextlib import aclosing, asynccontextmanager

import pytest
import torch
import trio
from transformers import GenerationConfig

from peerd.client.blocks import ModelFacts
from peerd.client.decoding import Decoding
from peerd.client.grammars.grammar import Grammar
from peerd.client.model import SwarmModel
from peerd.client.speculation.controller import Controller
from peerd.client.speculation.drafts import Draft
from peerd.client.speculation.speculation import MOST_DRAFTED, Speculation
from peerd.client.steps.windows import Windows
from peerd.protocol.errors import NoChain

WIDTH = 8
BLOCKS = 9
MAX_LENGTH = 256
END = 256
PROMPT = [1, 2, 3]


class SoftHead:
    """Bytes in; logits that a whole hidden state decides, so that sampling has a choice."""

    vocab_size = END + 1

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self._in = torch.randn(END + 1, WIDTH, generator=generator)
        self._out = torch.randn(WIDTH, END + 1, generator=generator)

    def embed(self, token_ids, start=0):
        return self._in[torch.tensor(list(token_ids), dtype=torch.long)]

    async def in_thread(self, function, *arguments, limiter=None):
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    async def logits(self, hidden, most=None):
        await trio.lowlevel.checkpoint()
        return torch.nn.functional.layer_norm(hidden.float(), (WIDTH,)) @ self._out


class Foresight:
    """Guesses from known answers, row by row, and errs with a probability, always at the same positions."""

    def __init__(self, answer, right):
        self._answer = answer
        self._right = right

    def propose(self, text, count):
        start = len(text) - len(PROMPT)
        ahead = self._answer[start : start + count]
        return Draft(tuple(self._guess(start + place, token) for place, token in enumerate(ahead)))

    def _guess(self, position, token):
        luck = random.Random(position)
        return token if luck.random() < self._right else luck.randrange(256)


@pytest.fixture
def all_are_sent(monkeypatch):
    """Send any number of guesses in a step, and behind steps that are on their way: what the controller would choose
    has tests of its own.
    """
    luck = random.Random(7)

    def some(chances):
        return min(len(chances), luck.randrange(MOST_DRAFTED + 1))

    monkeypatch.setattr(Controller, "choose", lambda self, chances: [some(row) for row in chances])
    monkeypatch.setattr(Controller, "behind", lambda self, chances: some(chances))


@pytest.fixture
def open_model(open_swarm, byte_tokenizer):
    """`async with open_model() as (model, swarm):` three servers and a client's model."""

    @asynccontextmanager
    async def open_it(*, limits_rollback=False):
        async with open_swarm() as swarm:
            for start in range(0, BLOCKS, 3):
                await swarm.serve(start, start + 3)
            client = await swarm.client()
            # Its servers keep nothing for positions that may be cut off, so that several windows are on their way.
            facts = ModelFacts(
                "bytes", bytes(range(32)), BLOCKS, WIDTH, MAX_LENGTH, "float32", limits_rollback=limits_rollback
            )
            config = GenerationConfig(eos_token_id=END)
            model = SwarmModel(facts, SoftHead(), byte_tokenizer, config, client.finder, client.opener, client.tasks)
            yield model, swarm

    return open_it


def decoding_of(model, speculation, rows=1, stop=(), top_logprobs=None, **sampling):
    params = model.sampling_params(**{"max_new_tokens": 60, "eos_token_ids": [], **sampling})
    return Decoding(model, PROMPT, params, rows=rows, stop=stop, top_logprobs=top_logprobs, speculation=speculation)


async def run(decoding, rows=1, on_token=lambda _: None):
    """All that was picked, row by row."""
    picked = [[] for _ in range(rows)]
    async with aclosing(decoding.tokens()) as tokens:
        async for token in tokens:
            picked[token.row].append(token)
            on_token(token)
    return picked


async def answer(model, speculation, rows=1, **options):
    return await run(decoding_of(model, speculation, rows, **options), rows)


def ids(picked):
    return [[token.id for token in row] for row in picked]


def foresight(answers, right):
    """A `Speculation` whose drafters know these answers, one for each row in turn."""
    rows = iter(answers)
    return Speculation(lambda: Foresight(next(rows), right))


PERSON = Grammar.json_schema(
    {
        "type": "object",
        "properties": {"age": {"type": "integer"}, "from": {"enum": ["Rome", "Oslo"]}},
        "required": ["age", "from"],
        "additionalProperties": False,
    }
)
CASES = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 11},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5, "seed": 3},
    "bias": {"temperature": 1.0, "logit_bias": [(65, 4.0), (66, -9.0)], "seed": 5},
    "rows": {"temperature": 1.0, "rows": 3, "seed": 8},
    "logprobs": {"temperature": 1.0, "top_logprobs": 4, "seed": 9},
    "grammar": {"temperature": 1.0, "grammar": Grammar.regex("([A-Z][a-z]{1,4}[ .])*"), "seed": 6},
    "rows in a grammar": {"temperature": 1.2, "rows": 3, "grammar": Grammar.regex("([A-Z][a-z]{1,4}[ .])*"), "seed": 2},
    "json": {"temperature": 1.0, "grammar": PERSON, "eos_token_ids": [END], "seed": 3, "max_new_tokens": 60},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
}


@pytest.mark.parametrize(
    ("case", "right"), [*((case, 0.7) for case in CASES), *itertools.product(("greedy", "rows"), (0.0, 1.0))]
)
async def test_the_tokens_are_those_of_plain_decoding(open_model, all_are_sent, case, right):
    async with open_model() as (model, swarm):
        plain = await answer(model, None, **CASES[case])
        decoding = decoding_of(model, foresight(ids(plain), right), **CASES[case])
        guessed = await run(decoding, len(plain))
        assert ids(guessed) == ids(plain)
        for row, other in zip(guessed, plain, strict=True):
            assert [(token.position, token.text, token.finish) for token in row] == [
                (token.position, token.text, token.finish) for token in other
            ]
            for token, same in zip(row, other, strict=True):
                if token.logprobs is not None:
                    assert token.logprobs.logprob == pytest.approx(same.logprobs.logprob, abs=1e-4)
                    assert [i for i, _ in token.logprobs.top] == [i for i, _ in same.logprobs.top]
        if "max_new_tokens" not in CASES[case]:
            assert decoding.speculator.drafted > 20
            if right == 1.0:
                assert decoding.session.log.answered < 20
        await trio.sleep(1)
        assert all(host.server.sessions == 0 for host in swarm.hosts)


@pytest.mark.parametrize("right", [0.5, 1.0])
async def test_answers_in_a_grammar_keep_to_it_whatever_is_guessed(open_model, all_are_sent, right):
    async with open_model() as (model, _):
        sampling = {"temperature": 1.5, "grammar": PERSON, "eos_token_ids": [END], "rows": 4, "max_new_tokens": 200}
        plain = await answer(model, None, **sampling)
        for rows in (plain, await answer(model, foresight(ids(plain), right), **sampling)):
            for row in rows:
                value = json.loads("".join(token.text for token in row))
                assert isinstance(value["age"], int)
                assert value["from"] in ("Rome", "Oslo")
                assert [token.finish for token in row] == [None] * (len(row) - 1) + ["stop"]


async def test_windows_start_behind_others_and_are_given_up_where_a_guess_before_them_is_wrong(
    open_model, all_are_sent, monkeypatch
):
    ahead, given_up = [], []
    settle = Windows.settle

    def watching(self):
        before = len(self)
        ahead.append(before)
        settle(self)
        given_up.append(before - len(self))

    monkeypatch.setattr(Windows, "settle", watching)
    async with open_model() as (model, _):
        [plain] = await answer(model, None, temperature=1.0, seed=2)
        decoding = decoding_of(model, foresight(ids([plain]), 0.9), temperature=1.0, seed=2)
        assert ids(await run(decoding)) == ids([plain])
        assert max(ahead) == 2
        assert 0 < sum(map(bool, given_up)) < sum(map(bool, ahead))
        assert 0 < decoding.speculator.accepted < decoding.speculator.drafted


@pytest.mark.parametrize("limits_rollback", [False, True])
async def test_no_more_guesses_are_on_their_way_than_servers_can_cut_off(open_model, monkeypatch, limits_rollback):
    monkeypatch.setattr(Controller, "choose", lambda self, chances: [len(row) for row in chances])
    monkeypatch.setattr(Controller, "behind", lambda self, chances: min(len(chances), MOST_DRAFTED + 1))
    most = []
    settle = Windows.settle
    monkeypatch.setattr(Windows, "settle", lambda self: (most.append(len(self.guessed)), settle(self)))
    async with open_model(limits_rollback=limits_rollback) as (model, _):
        plain = await answer(model, None, max_new_tokens=150)
        decoding = decoding_of(model, foresight(ids(plain), 0.95), max_new_tokens=150)
        assert ids(await run(decoding)) == ids(plain)
        size = decoding.session.spec.terms.size
        assert size.max_rollback == (31 if limits_rollback else 95)
        assert (max(most) > 31) == (not limits_rollback)


async def test_stops_end_a_row_in_mid_draft(open_model, all_are_sent):
    async with open_model() as (model, _):
        plain = await answer(model, None, temperature=1.0, seed=2)
        [row] = ids(plain)
        text = model.decode(row)
        stop = text[10:12]
        short = await answer(model, None, temperature=1.0, seed=2, stop=[stop])
        guessed = await answer(model, foresight([row], 1.0), temperature=1.0, seed=2, stop=[stop])
        assert ids(guessed) == ids(short)
        assert "".join(token.text for token in guessed[0]) == "".join(token.text for token in short[0])
        ended = await answer(model, foresight([row], 1.0), temperature=1.0, seed=2, eos_token_ids=[row[20]])
        assert ids(ended) == [row[: row.index(row[20]) + 1]]


async def test_rows_that_end_at_different_times_disturb_nobody(open_model, all_are_sent):
    async with open_model() as (model, _):
        sampling = {"temperature": 1.0, "rows": 4, "seed": 21}
        whole = await answer(model, None, **sampling)
        ends = [ids(whole)[0][7], ids(whole)[2][30]]
        plain = await answer(model, None, **sampling | {"eos_token_ids": ends})
        assert len({len(row) for row in plain}) > 1
        guessed = await answer(model, foresight(ids(whole), 0.7), **sampling | {"eos_token_ids": ends})
        assert ids(guessed) == ids(plain)


@pytest.mark.parametrize("grammar", [None, CASES["grammar"]["grammar"]], ids=["free", "in a grammar"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("at", [5, 17, 31])
async def test_a_death_in_mid_window_changes_no_token(open_model, all_are_sent, at, rows, grammar):
    async with open_model() as (model, swarm):
        sampling = {"temperature": 1.0, "rows": rows, "seed": 4, "grammar": grammar}
        plain = await answer(model, None, **sampling)
        await swarm.serve(3, 6)

        decoding = decoding_of(model, foresight(ids(plain), 0.7), **sampling)

        def kill(token):
            if token.position == at and token.row == 0:
                peer = decoding.session.chain[1].peer
                swarm.kill(next(host for host in swarm.hosts if host.peer_id == peer))

        guessed = await run(decoding, rows, kill)
        assert ids(guessed) == ids(plain)
        assert decoding.session.failovers == 1


async def test_an_answer_without_servers_goes_on_once_a_server_comes(open_model, all_are_sent):
    async with open_model() as (model, swarm):
        plain = await answer(model, None)
        model.speculation = foresight(ids(plain), 0.7)
        generation = model.generate(PROMPT, temperature=0, max_new_tokens=60, eos_token_ids=[])
        tokens = aiter(generation)
        for _ in range(9):
            await anext(tokens)
        swarm.kill(swarm.hosts[1])
        with pytest.raises(NoChain, match="3:6"):
            async for _ in tokens:
                pass
        assert len(generation.token_ids) < 60
        await swarm.serve(3, 6)
        async for _ in generation:
            pass
        assert [generation.token_ids] == ids(plain)
        assert generation.drafted > generation.accepted > 10


@pytest.mark.parametrize("after_s", [0.0, 0.06, 0.1, 0.13, 0.5])
async def test_cancelling_frees_what_the_servers_hold(open_model, all_are_sent, after_s):
    async with open_model() as (model, swarm):
        plain = await answer(model, None)
        with trio.move_on_after(after_s):
            await answer(model, foresight(ids(plain), 0.6))
        await trio.sleep(0.1)
        assert all(host.server.sessions == 0 for host in swarm.hosts)
        assert all(host.task.engine.free_tokens == 4096 for host in swarm.hosts)
        assert model.speculation.rows_now == 0


async def test_an_answer_up_to_the_last_position_of_the_model(open_model, all_are_sent):
    async with open_model() as (model, _):
        limit = MAX_LENGTH - len(PROMPT)
        plain = await answer(model, None, max_new_tokens=limit)
        guessed = await answer(model, foresight(ids(plain), 0.9), max_new_tokens=limit)
        assert ids(guessed) == ids(plain)


async def test_a_text_that_repeats_itself_is_faster_with_its_own_controller(open_model):
    """No part is replaced: the simulated chain computes 30 ms and travels 20 ms a step, whatever the step carries."""
    async with open_model() as (model, _):
        prompt = [*range(10, 42)] * 4
        bias = [(token, 80.0) for token in (65,)]
        times = []
        for speculate in (False, True):
            generation = model.generate(prompt, speculate=speculate, logit_bias=bias, max_new_tokens=100)
            async for _ in generation:
                pass
            assert generation.token_ids == [65] * 100
            times.append(generation.last_token - generation.first_token)
        plain_s, guessed_s = times
        assert guessed_s < plain_s / 3
