"""A last hop that draws tokens draws those that the client would have drawn, also when hops die, lie or draw none."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio
from transformers import GenerationConfig

from peerd.client.blocks import ModelFacts
from peerd.client.decoding import Decoding
from peerd.client.model import SwarmModel
from peerd.client.sampling import SamplingParams
from peerd.server.served_head import ServedHead
from tests.fakes.byte_head import END, WIDTH, RandomHead

BLOCKS = 6
PROMPT = [7, 8, 9, 7, 8]

SAMPLINGS = {
    "greedy": SamplingParams(max_new_tokens=24),
    "seeded": SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=11, max_new_tokens=24),
    "penalties": SamplingParams(
        temperature=1.2,
        repetition_penalty=1.3,
        frequency_penalty=0.4,
        presence_penalty=0.2,
        seed=-5,
        max_new_tokens=24,
    ),
    "biases": SamplingParams(
        logit_bias=((3, 4.5), (9, -2.0)), min_new_tokens=8, eos_token_ids=(END, 3), max_new_tokens=24
    ),
}


class Client:
    """A model of a swarm of a first server and as many last ones as wanted, each with the head or without."""

    def __init__(self, swarm, client, byte_tokenizer) -> None:
        self.swarm = swarm
        self.client = client
        self.tokenizer = byte_tokenizer
        self.head = RandomHead()

    def model(self, *, remote: bool) -> SwarmModel:
        facts = ModelFacts("bytes", bytes(range(32)), BLOCKS, WIDTH, 1024, "float32")
        client, config = self.client, GenerationConfig(eos_token_id=END)
        return SwarmModel(
            facts,
            self.head,
            self.tokenizer,
            config,
            client.finder,
            client.opener,
            client.tasks,
            remote_head=remote,
        )

    def decoding(self, sampling, *, remote=True, **more) -> Decoding:
        model = self.model(remote=remote)
        return Decoding(model, PROMPT, sampling, speculation=model.speculation, **more)

    async def answer(self, sampling, **more):
        return [(picked.row, picked.id, picked.logprobs) async for picked in self.decoding(sampling, **more).tokens()]


@pytest.fixture
def open_client(open_swarm, byte_tokenizer):
    @asynccontextmanager
    async def open_it(*heads):
        async with open_swarm() as swarm:
            await swarm.serve(0, 3)
            for head in heads:
                await swarm.serve(3, BLOCKS, head=head)
            yield Client(swarm, await swarm.client(), byte_tokenizer)

    return open_it


def served() -> ServedHead:
    return ServedHead(RandomHead())


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize(("rows", "logprobs"), [(1, None), (1, 3), (3, 0)])
async def test_the_last_hop_draws_the_tokens_that_the_client_draws(open_client, name, rows, logprobs):
    async with open_client(served()) as client:
        asked = {"rows": rows, "top_logprobs": logprobs}
        expected = await client.answer(SAMPLINGS[name], remote=False, **asked)
        computed, client.head.calls = client.head.calls, 0
        assert await client.answer(SAMPLINGS[name], **asked) == expected
        assert computed > 0
        assert client.head.calls == 0, "the client computed logits of its own"
        assert len({token for _, token, _ in expected}) > 3


@pytest.mark.parametrize("others", [[served], [served, None], [None]], ids=["draws", "draws-rather", "draws-none"])
async def test_an_answer_goes_on_with_the_same_tokens_when_its_last_hop_dies(open_client, others):
    async with open_client(served()) as client:
        expected = await client.answer(SAMPLINGS["penalties"], remote=False)
        client.head.calls = 0
        tokens = []
        async for picked in client.decoding(SAMPLINGS["penalties"]).tokens():
            tokens.append((picked.row, picked.id, picked.logprobs))
            if len(tokens) == 12:
                for make in others:
                    await client.swarm.serve(3, BLOCKS, head=make and make())
                client.swarm.kill(client.swarm.hosts[1])
        assert tokens == expected
        assert (client.head.calls > 0) == (others == [None])


async def test_where_no_last_hop_draws_the_client_does(open_client):
    async with open_client(None) as client:
        expected = await client.answer(SAMPLINGS["seeded"], remote=False)
        assert await client.answer(SAMPLINGS["seeded"]) == expected


class Forger(ServedHead):
    """Draws something that no honest hop draws. When it first does so, `found_out` is awaited."""

    def __init__(self, pairs) -> None:
        super().__init__(RandomHead())
        self.pairs = pairs
        self.found_out = trio.lowlevel.checkpoint

    async def draw(self, hidden, source, places):
        await self.found_out()
        return [pair for _ in places for pair in self.pairs]


@pytest.mark.parametrize(
    ("pairs", "logprobs"),
    [
        ([((END + 1, None),)], None),
        ([((3, None),), ((4, None),)], None),
        ([((3, 0.25), (3, 0.25))], 1),
        ([((3, -1.0),)], 1),
        ([((3, -1.0),)], None),
    ],
    ids=["no-token", "too-many", "more-than-certain", "no-alternatives", "what-nobody-asked-for"],
)
async def test_a_hop_that_forges_tokens_is_replaced_and_blamed(open_client, pairs, logprobs):
    forger = Forger(pairs)
    async with open_client(forger) as client:
        liar = client.swarm.hosts[1]

        async def serve_honestly():
            if len(client.swarm.hosts) == 2:
                await client.swarm.serve(3, BLOCKS, head=served())

        forger.found_out = serve_honestly
        tokens = await client.answer(SAMPLINGS["seeded"], top_logprobs=logprobs)
        assert client.client.finder.failures == [liar.peer_id]
        assert tokens == await client.answer(SAMPLINGS["seeded"], remote=False, top_logprobs=logprobs)


async def test_a_chat_of_another_sampling_takes_up_the_session_that_was_kept(open_client):
    async with open_client(served()) as client:
        model = client.model(remote=True)
        model.keep_sessions(4096)
        first = SamplingParams(temperature=1.0, repetition_penalty=1.2, seed=1, max_new_tokens=60, eos_token_ids=())
        prompt = PROMPT * 10
        tokens = [picked.id async for picked in Decoding(model, prompt, first).tokens()]
        again = SamplingParams(temperature=0.7, frequency_penalty=0.6, seed=2, max_new_tokens=20)
        chat = Decoding(model, [*prompt, *tokens, 1, 2], again)
        answer = [picked.id async for picked in chat.tokens()]
        assert chat.cached > 100
        fresh = Decoding(client.model(remote=False), [*prompt, *tokens, 1, 2], again)
        assert answer == [picked.id async for picked in fresh.tokens()]
