"""The swarm gives the same tokens as local Transformers, and it really is the swarm that computes them."""

from __future__ import annotations

import pytest
import trio

pytestmark = [pytest.mark.real_time, pytest.mark.model]

NEW_TOKENS = 16
NEW_TOKENS_AFTER_LONG = 8
CHAT = (
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "Was ist größer: 7 oder 12? Antworte kurz.",
    "Explain what a list comprehension is.",
)
PLAIN = (
    "Once upon a time",
    "The three laws of motion are",
    "def fibonacci(n):\n",
    "1, 2, 4, 8, 16,",
)


def long_prompt() -> str:
    """Over 1,000 tokens, no part of which repeats another."""
    return "\n".join(f"{number} times {number + 7} is {number * (number + 7)}." for number in range(3, 80))


async def run_all(generations):
    """All of them at once."""

    async def run(generation) -> None:
        async for _ in generation:
            pass

    async with trio.open_nursery() as nursery:
        for generation in generations:
            nursery.start_soon(run, generation)


@pytest.fixture(scope="module")
def answers(reference):
    """Ten prompts, nine short ones and a long one, with what Transformers answers."""
    prompts = [reference.encode(prompt, chat=True) for prompt in CHAT]
    prompts += [reference.encode(prompt) for prompt in PLAIN]
    found = [reference.answer(prompt, NEW_TOKENS) for prompt in prompts]
    found.append(reference.answer(reference.encode(long_prompt()), NEW_TOKENS_AFTER_LONG))
    return found


def test_the_reference_is_sure_of_nearly_every_token(answers):
    """Otherwise the comparisons below would say little."""
    margins = [margin for answer in answers for margin in answer.margins]
    print(f"{len(margins)} tokens, smallest margin {min(margins):.2g}")
    assert len(answers[-1].prompt) > 1000
    assert sum(len(answer.decisive) for answer in answers) >= 0.9 * len(margins)


@pytest.mark.parametrize("servers", [1, 2, 3])
async def test_ten_answers_at_once_equal_local_transformers(open_local_swarm, answers, servers):
    async with open_local_swarm(servers) as swarm, swarm.client() as model:
        prompts = [*((text, True) for text in CHAT), *((text, False) for text in (*PLAIN, long_prompt()))]
        generations = [
            model.generate(text, chat=chat, temperature=0, max_new_tokens=len(answer.token_ids), speculate=False)
            for (text, chat), answer in zip(prompts, answers, strict=True)
        ]
        await run_all(generations)

        for generation, answer in zip(generations, answers, strict=True):
            assert tuple(generation.prompt) == answer.prompt
            assert tuple(generation.token_ids[: len(answer.decisive)]) == answer.decisive
            assert [hop.peer for hop in generation.chain] == [str(server.peer.peer_id) for server in swarm.servers]
            assert generation.failovers == 0
        # The last token of an answer is never sent; every other position went through every server, once.
        positions = sum(len(g.prompt) + len(g.token_ids) - 1 for g in generations)
        assert [server.engine.positions_computed for server in swarm.servers] == [positions] * servers


async def test_sampling_with_a_seed_gives_the_same_tokens_on_any_servers(open_local_swarm):
    sampled = []
    for servers in (1, 2):
        async with open_local_swarm(servers) as swarm, swarm.client() as model:
            sampling = {"temperature": 0.9, "top_k": 0, "top_p": 0.95, "max_new_tokens": NEW_TOKENS}
            generations = [model.generate("My favourite animal is", seed=seed, **sampling) for seed in (1, 1, 2)]
            await run_all(generations)
            sampled += [generation.token_ids for generation in generations]
    assert sampled[0] == sampled[1] == sampled[3] == sampled[4]
    assert sampled[2] == sampled[5] != sampled[0]
