"""Log-probabilities of prompts, as evaluation harnesses ask for them."""

from __future__ import annotations

import math

import pytest
import trio

from tests.peerd.api.conftest import BLOCKS

TEXT = "Rome: caf\u00e9!"
IDS = list(TEXT.encode())


@pytest.fixture
def ask(open_api, soft_head):
    """`await ask(**fields)`: what the API answers to a completion."""

    async def ask(**fields):
        async with open_api(soft_head) as (caller, swarm):
            answer = await caller.post("/v1/completions", {"model": "bytes", "temperature": 0} | fields)
            await trio.sleep(1)
            assert all(host.server.sessions == 0 for host in swarm.hosts)
        return answer

    return ask


@pytest.fixture
def expected(soft_head, whole_forward):
    """`await expected(ids)`: the log-probabilities of each token and of the likeliest one, computed without a swarm."""

    async def expected(ids):
        hidden = whole_forward(soft_head.embed(ids), BLOCKS)
        logits = (await soft_head.logits(hidden)).log_softmax(-1)
        pairs = zip(logits[:-1], ids[1:], strict=True)
        return [None] + [(float(row[token]), float(row.max())) for row, token in pairs]

    return expected


def lists_of(answer):
    return [choice["logprobs"] for choice in answer.json["choices"]]


async def test_every_token_of_the_prompt_has_what_the_model_gave_it(ask, expected):
    answer = await ask(prompt=TEXT, max_tokens=0, echo=True, logprobs=1)
    assert answer.status == 200, answer.body
    (choice,) = answer.json["choices"]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    usage = answer.json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (len(IDS), 0, len(IDS))
    lists = choice["logprobs"]
    assert lists["tokens"] == [*"Rome: caf", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert lists["text_offset"] == [*range(9), 9, 9, 10]
    # As in OpenAI's API: nothing predicts the first token.
    assert lists["token_logprobs"][0] is None
    assert lists["top_logprobs"][0] is None
    own = await expected(IDS)
    for place in range(1, len(IDS)):
        token, top = own[place]
        assert lists["token_logprobs"][place] == pytest.approx(token, abs=1e-4)
        assert max(lists["top_logprobs"][place].values()) == pytest.approx(top, abs=1e-4)
        assert lists["tokens"][place] in lists["top_logprobs"][place]


@pytest.mark.parametrize("rows", [1, 2])
async def test_prompts_of_a_list_are_scored_each_for_itself_and_go_on(ask, rows):
    prompts = [IDS, IDS[:3], [82]]
    answer = await ask(prompt=prompts, max_tokens=2, echo=True, logprobs=0, n=rows, ignore_eos=True)
    assert len(answer.json["choices"]) == 3 * rows
    for number, choice in enumerate(answer.json["choices"]):
        prompt = prompts[number // rows]
        lists = choice["logprobs"]
        assert choice["index"] == number
        assert choice["text"].startswith(bytes(prompt).decode())
        assert [len(values) for values in lists.values()] == [len(prompt) + 2] * 4
        assert [value is None for value in lists["token_logprobs"]] == [True] + [False] * (len(prompt) + 1)
        # A prompt's scores do not depend on what else is asked.
        alone = lists_of(await ask(prompt=prompt, max_tokens=0, echo=True, logprobs=0))[0]
        assert lists["token_logprobs"][1 : len(prompt)] == pytest.approx(alone["token_logprobs"][1:], abs=1e-4)
        assert lists["text_offset"][len(prompt)] == len(bytes(prompt).decode())


async def test_a_harness_finds_the_likelihood_of_each_choice_and_whether_it_is_greedy(ask, expected):
    """The request is that of lm-eval's `local-completions`, and so is what is read of the answer."""
    question, choices = list(b"2+2="), [list(b"4"), list(b"five"), list(b"twenty-two")]
    greedy = list((await ask(prompt=[question], max_tokens=2, ignore_eos=True)).json["choices"][0]["text"].encode())
    prompts = [question + choice for choice in [*choices, greedy]]
    answer = await ask(prompt=prompts, max_tokens=1, logprobs=1, echo=True, seed=1234)
    for prompt, lists in zip(prompts, lists_of(answer), strict=True):
        own = (await expected(prompt))[len(question) :]
        scored = slice(len(question), -1)
        assert sum(lists["token_logprobs"][scored]) == pytest.approx(sum(token for token, _ in own), abs=1e-3)
        tops = [max(top.values()) for top in lists["top_logprobs"][scored]]
        is_greedy = lists["token_logprobs"][scored] == tops
        assert is_greedy == all(token == top for token, top in own)
    assert is_greedy


async def test_the_answer_behind_the_prompt_is_the_same_as_without_echo(ask):
    plain = await ask(prompt=TEXT, max_tokens=5, logprobs=2, ignore_eos=True)
    echoed = await ask(prompt=TEXT, max_tokens=5, logprobs=2, ignore_eos=True, echo=True)
    assert echoed.json["choices"][0]["text"] == TEXT + plain.json["choices"][0]["text"]
    behind = {name: values[len(IDS) :] for name, values in lists_of(echoed)[0].items()}
    offsets = [offset + len(TEXT) for offset in lists_of(plain)[0]["text_offset"]]
    assert behind == lists_of(plain)[0] | {"text_offset": offsets}


@pytest.mark.parametrize("max_tokens", [0, 3])
async def test_a_stream_brings_the_prompt_and_its_scores_first(ask, max_tokens):
    fields = {"prompt": [IDS, IDS[:4]], "max_tokens": max_tokens, "echo": True, "logprobs": 1, "ignore_eos": True}
    whole = await ask(**fields)
    events = (await ask(**fields, stream=True)).events
    assert events.pop() == "[DONE]"
    for choice in whole.json["choices"]:
        pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
        for name, values in choice["logprobs"].items():
            assert [value for piece in pieces for value in piece["logprobs"][name]] == values


async def test_nothing_is_continued_without_scores_either(ask):
    answer = await ask(prompt=TEXT, max_tokens=0, echo=True)
    assert answer.json["choices"][0] == {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "length"}
    assert lists_of(await ask(prompt=TEXT, max_tokens=0, logprobs=1)) == [
        {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    ]


async def test_a_long_prompt_is_scored_over_pieces_of_the_session(ask, expected):
    ids = [(number * 37) % 250 for number in range(900)]
    answer = await ask(prompt=ids, max_tokens=0, echo=True, logprobs=0)
    values = lists_of(answer)[0]["token_logprobs"]
    own = await expected(ids)
    assert values[1:] == pytest.approx([token for token, _ in own[1:]], abs=1e-4)
    assert math.isfinite(sum(values[1:]))


async def test_all_of_a_prompt_is_scored_though_an_earlier_answer_has_computed_it(open_api, soft_head):
    prompt = IDS * 10
    scored = {"model": "bytes", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0}
    plain = {"model": "bytes", "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    async with open_api(soft_head, kept_positions=4096) as (caller, _):
        before = lists_of(await caller.post("/v1/completions", scored))
        first = await caller.post("/v1/completions", plain)
        assert lists_of(await caller.post("/v1/completions", scored)) == before
        # And its session, which no chat goes on from, takes the place of none that is kept.
        again = await caller.post("/v1/completions", plain)
    assert first.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert again.json["usage"]["prompt_tokens_details"]["cached_tokens"] == len(prompt) - 1


async def test_a_hop_s_death_meanwhile_changes_no_score(open_api, soft_head):
    body = {"model": "bytes", "prompt": IDS * 20, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}
    async with open_api(soft_head) as (caller, swarm):
        before = await caller.post("/v1/completions", body)
        await swarm.serve(3, 6)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_kill_soon, swarm)
            during = await caller.post("/v1/completions", body)
    assert lists_of(during) == lists_of(before)


async def _kill_soon(swarm):
    await trio.sleep(0.05)
    swarm.kill(next(host for host in swarm.hosts if host.span.start == 3 and host.server.sessions))
