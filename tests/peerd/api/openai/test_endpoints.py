"""OpenAI's endpoints over a swarm in memory: formats, limits, errors, and the effect of a closed connection."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import trio
from transformers import GenerationConfig

from peerd.api import app as app_module
from peerd.api import fields as fields_module
from peerd.api.openai.answering import Answering
from peerd.protocol.span import Span
from peerd.testing.fake_engine import fake_forward
from tests.peerd.api.conftest import Answer

BLOCKS = 9
WIDTH = 8
MODEL_NAME = "bytes"


def foretold(prompt, count):
    """What the model says after `prompt`, token by token."""
    ids = list(prompt)
    for _ in range(count):
        hidden = torch.tensor(ids).float()[:, None].expand(-1, WIDTH)
        ids.append(int(fake_forward(hidden, Span(0, BLOCKS))[-1, 0]))
    return ids[len(prompt) :]


def complete(**fields):
    return {"model": MODEL_NAME, "prompt": [1, 2, 3], "max_tokens": 5} | fields


def chat(**fields):
    return {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5} | fields


async def test_a_completion_is_what_the_model_says(open_api):
    async with open_api() as (caller, _):
        answer = await caller.post("/v1/completions", complete(logprobs=2))
    assert answer.status == 200
    (choice,) = answer.json["choices"]
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == 5
    assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [2] * 5
    assert answer.json["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer.json["object"] == "text_completion"


async def test_several_prompts_and_answers_are_numbered_prompt_by_prompt(open_api):
    prompts = [[1, 2, 3], [9, 9]]
    async with open_api() as (caller, _):
        both = await caller.post("/v1/completions", complete(prompt=prompts, n=2))
        alone = [await caller.post("/v1/completions", complete(prompt=prompt)) for prompt in prompts]
    texts = [choice["text"] for choice in both.json["choices"]]
    assert [choice["index"] for choice in both.json["choices"]] == [0, 1, 2, 3]
    first, second = (answer.json["choices"][0]["text"] for answer in alone)
    assert texts == [first, first, second, second]


async def test_answers_to_one_prompt_draw_differently_and_the_first_as_alone(open_api):
    fields = {"temperature": 2, "seed": 7, "max_tokens": 12, "top_k": 0, "logit_bias": {"256": -100}}
    async with open_api() as (caller, _):
        three = await caller.post("/v1/completions", complete(n=3, **fields))
        again = await caller.post("/v1/completions", complete(n=3, **fields))
        one = await caller.post("/v1/completions", complete(**fields))
    texts = [choice["text"] for choice in three.json["choices"]]
    assert len(set(texts)) == 3
    assert texts == [choice["text"] for choice in again.json["choices"]]
    assert texts[0] == one.json["choices"][0]["text"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_pieces_add_up_to_the_whole(open_api, path):
    asked = (complete if path == "/v1/completions" else chat)(max_tokens=20, n=2)
    async with open_api() as (caller, _):
        whole = (await caller.post(path, asked)).json
        streamed = await caller.post(path, asked | {"stream": True, "stream_options": {"include_usage": True}})
    *pieces, last, done = streamed.events
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert done == "[DONE]"
    assert last["usage"] == whole["usage"]
    assert last["choices"] == []
    texts, ends = ["", ""], [None, None]
    for piece in pieces:
        assert piece["id"] == pieces[0]["id"]
        (choice,) = piece["choices"]
        texts[choice["index"]] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        ends[choice["index"]] = choice["finish_reason"]
    if path == "/v1/completions":
        assert texts == [choice["text"] for choice in whole["choices"]]
    else:
        assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert ends == [choice["finish_reason"] for choice in whole["choices"]]


async def test_a_chat_goes_through_the_model_s_template(open_api):
    text = "<system>Short.<user>Hi<assistant>"
    messages = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}]
    async with open_api() as (caller, _):
        answer = await caller.post("/v1/chat/completions", chat(messages=messages))
        same = await caller.post("/v1/completions", complete(prompt=text))
    assert answer.json["choices"][0]["message"]["content"] == same.json["choices"][0]["text"]
    assert answer.json["usage"]["prompt_tokens"] == len(text)


async def test_a_stop_string_ends_the_answer_and_is_left_out(open_api, scripted_head):
    async with open_api(scripted_head("one two three")) as (caller, _):
        answer = await caller.post("/v1/completions", complete(max_tokens=50, stop=["zero", " th"]))
    (choice,) = answer.json["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("one two", "stop")


async def test_an_answer_that_ends_by_itself_says_so(open_api, scripted_head):
    async with open_api(scripted_head("good day")) as (caller, _):
        answer = await caller.post("/v1/chat/completions", chat(max_tokens=50))
    (choice,) = answer.json["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("good day", "stop")
    assert answer.json["usage"]["completion_tokens"] == len("good day") + 1


async def test_an_answer_goes_on_after_its_end_if_the_client_says_so(open_api, scripted_head):
    async with open_api(scripted_head("good day")) as (caller, _):
        answer = await caller.post("/v1/completions", complete(max_tokens=20, ignore_eos=True))
    assert answer.json["choices"][0]["finish_reason"] == "length"
    assert answer.json["usage"]["completion_tokens"] == 20


async def test_an_answer_has_at_least_so_many_tokens(open_api, scripted_head):
    async with open_api(scripted_head("ab")) as (caller, _):
        answer = await caller.post("/v1/completions", complete(max_tokens=20, min_tokens=7, stop="b"))
    assert answer.json["usage"]["completion_tokens"] == 8
    assert answer.json["choices"][0]["finish_reason"] == "stop"
    assert answer.json["choices"][0]["text"].startswith("ab")


async def test_a_stop_token_ends_the_answer_and_is_no_part_of_it(open_api, scripted_head):
    async with open_api(scripted_head("one two")) as (caller, _):
        answer = await caller.post("/v1/completions", complete(max_tokens=20, stop_token_ids=[ord("t")]))
    (choice,) = answer.json["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("one ", "stop")


async def test_a_last_message_is_continued(open_api):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel"}]
    async with open_api() as (caller, _):
        answer = await caller.post("/v1/chat/completions", chat(messages=messages, continue_final_message=True))
        same = await caller.post("/v1/completions", complete(prompt="<user>Hi<assistant>Hel"))
    assert answer.json["choices"][0]["message"]["content"] == same.json["choices"][0]["text"]


async def test_a_reasoning_effort_is_for_models_whose_template_has_one(open_api):
    async with open_api() as (caller, _):
        none = await caller.post("/v1/chat/completions", chat(reasoning_effort="none"))
        high = await caller.post("/v1/chat/completions", chat(reasoning_effort="high"))
    assert none.json["usage"]["prompt_tokens"] == len("<user>Hi/no_think<assistant>")
    assert (high.status, high.json["error"]["param"]) == (400, "reasoning_effort")


@pytest.mark.parametrize("continuous", [False, True], ids=["at the end", "so far"])
async def test_pieces_have_a_field_for_usage_if_usage_is_asked_for(open_api, continuous):
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    async with open_api() as (caller, _):
        answer = await caller.post("/v1/completions", complete(stream=True, stream_options=options))
        plain = await caller.post("/v1/completions", complete(stream=True))
    *pieces, last, _ = answer.events
    counts = [piece["usage"] and piece["usage"]["completion_tokens"] for piece in pieces]
    assert counts == ([1, 2, 3, 4, 5] if continuous else [None] * 5)
    assert last["usage"]["completion_tokens"] == 5
    assert all("usage" not in piece for piece in plain.events[:-1])


async def test_parts_of_characters_keep_their_bytes_among_the_logprobs(open_api, scripted_head):
    text = "\u65e5!"
    async with open_api(scripted_head(text)) as (caller, _):
        answer = await caller.post("/v1/chat/completions", chat(logprobs=True, top_logprobs=2, max_tokens=4))
    async with open_api(scripted_head(text)) as (caller, _):
        plain = await caller.post("/v1/completions", complete(logprobs=2, max_tokens=4))
    shown = [entry["token"] for entry in answer.json["choices"][0]["logprobs"]["content"]]
    assert shown == ["bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5", "!"]
    assert plain.json["choices"][0]["logprobs"]["tokens"] == shown
    data = [entry["bytes"] for entry in answer.json["choices"][0]["logprobs"]["content"]]
    assert bytes(byte for part in data for byte in part).decode() == text


@pytest.mark.parametrize("count", [0, 3])
async def test_the_chosen_token_is_among_the_logprobs_even_if_it_is_unlikely(open_api, scripted_head, count):
    asked = complete(logprobs=count, max_tokens=1, logit_bias={"65": 100})
    async with open_api(scripted_head("z")) as (caller, _):
        answer = await caller.post("/v1/completions", asked)
    logprobs = answer.json["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["A"]
    assert len(logprobs["top_logprobs"][0]) == count + 1
    assert logprobs["top_logprobs"][0]["A"] == logprobs["token_logprobs"][0]


async def test_a_model_that_says_nothing_of_sampling_answers_differently_each_time(open_api):
    async with open_api(generation_config=GenerationConfig(eos_token_id=256)) as (caller, _):
        silent = await caller.post("/v1/completions", complete(n=4, max_tokens=12))
    async with open_api(generation_config=GenerationConfig(eos_token_id=256, do_sample=False)) as (caller, _):
        greedy = await caller.post("/v1/completions", complete(n=4, max_tokens=12))
    assert len({choice["text"] for choice in silent.json["choices"]}) > 1
    assert len({choice["text"] for choice in greedy.json["choices"]}) == 1


async def test_penalties_count_what_was_said_and_not_what_was_asked(open_api, scripted_head):
    asked = complete(prompt="aaaa", max_tokens=4, logit_bias={"98": 3})
    async with open_api(scripted_head("aaaa")) as (caller, _):
        plain = await caller.post("/v1/completions", asked)
    async with open_api(scripted_head("aaaa")) as (caller, _):
        penalized = await caller.post("/v1/completions", asked | {"frequency_penalty": 1.5})
    assert plain.json["choices"][0]["text"] == "aaaa"
    # 5 for the likeliest against 3 for b: two a's take 3 off a, so b comes, takes 1.5 off itself, and a comes again.
    assert penalized.json["choices"][0]["text"] == "aaba"


async def test_an_echo_begins_with_the_prompt(open_api):
    async with open_api() as (caller, _):
        plain = await caller.post("/v1/completions", complete(prompt="Once"))
        echo = await caller.post("/v1/completions", complete(prompt="Once", echo=True))
    assert echo.json["choices"][0]["text"] == "Once" + plain.json["choices"][0]["text"]


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"model": "other"}, 404, "model_not_found"),
        ({"prompt": "x" * 1020, "max_tokens": 5}, 400, "context_length_exceeded"),
        ({"prompt": [1] * 2000}, 400, "context_length_exceeded"),
        ({"prompt": [1, 999]}, 400, "invalid_value"),
        ({"prompt": ""}, 400, None),
        ({"temperature": "hot"}, 400, "invalid_value"),
        ({"wrong": 1}, 400, "unknown_parameter"),
    ],
)
async def test_mistakes_are_told_before_any_peer_is_asked(open_api, fields, status, code):
    async with open_api() as (caller, swarm):
        answer = await caller.post("/v1/completions", complete(**fields))
        assert all(not host.server.sessions for host in swarm.hosts)
        assert all(not host.task.engine.positions_computed for host in swarm.hosts)
    assert answer.status == status
    assert answer.json["error"]["code"] == code
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a\ud83d"}, "prompt"),
        ({"prompt": ["fine \U0001f600", "\udc00"]}, "prompt[1]"),
        ({"stop": ["\ud800"]}, "stop[0]"),
        ({"metadata": {"a": {"b": "\ud800"}}}, "metadata.a.b"),
        ({"\ud800\n2026-11-30 09:00:00,000 INFO peerd: \x1b[31mforged": 1}, None),
        ({"metadata": {"\ud800": 1}}, "metadata"),
    ],
    ids=["prompt", "in a list", "stop", "inside", "name", "name inside"],
)
async def test_half_of_a_surrogate_pair_is_refused_by_name(open_api, caplog, fields, param):
    async with open_api() as (caller, _):
        answer = await caller.post("/v1/completions", complete(**fields))
    assert (answer.status, answer.json["error"]["param"]) == (400, param)
    assert "half a character" in answer.json["error"]["message"]
    assert not caplog.records


async def test_whole_characters_outside_the_basic_plane_are_no_halves(open_api):
    async with open_api() as (caller, _):
        answer = await caller.post("/v1/completions", complete(prompt="\U0001f600"))
    assert answer.status == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"model": \xff}', "not UTF-8, from byte 10 on"),
        (b'{"seed": 1' + 5000 * b"0" + b"}", "a number in it has thousands of digits"),
        (b'{"seed": NaN}', "NaN is not a JSON number"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{", "the body is not JSON"),
        (b"[]", "must be a JSON object"),
    ],
    ids=["not UTF-8", "long number", "NaN", "deep", "half", "list"],
)
async def test_a_body_that_is_no_json_is_refused_in_plain_words(open_api, body, said):
    async with open_api() as (caller, _):
        answer = await caller.post_bytes("/v1/completions", body)
    assert answer.status == 400
    assert said in answer.json["error"]["message"]
    assert len(answer.body) < 500


async def test_a_bug_of_ours_is_a_500_in_openai_s_shape(open_api, monkeypatch):
    def fail(*arguments, **fields):
        raise ZeroDivisionError

    monkeypatch.setattr(app_module, "read_completion", fail)
    async with open_api() as (caller, _):
        answer = Answer()
        with pytest.raises(ZeroDivisionError):
            await caller.post("/v1/completions", complete(), answer=answer)
    assert (answer.status, answer.json["error"]["code"]) == (500, "internal_error")


async def test_a_client_that_hangs_up_while_it_uploads_is_no_error(open_api, caplog):
    async with open_api() as (caller, _):
        answer = await caller.post_bytes("/v1/completions", b'{"model": "by', is_whole=False)
    assert answer.status == 0
    assert not caplog.records


async def test_a_body_that_never_comes_is_waited_for_for_a_minute(open_api):
    async with open_api() as (caller, _):
        began = trio.current_time()
        answer = await caller.post_bytes("/v1/completions", b'{"model": "by', is_whole=False, hang_up=trio.Event())
        assert trio.current_time() - began == pytest.approx(60)
    assert answer.status == 408
    assert answer.headers["connection"] == "close"


async def test_a_body_beyond_the_limit_is_refused_before_it_is_read_as_json(open_api, monkeypatch):
    monkeypatch.setattr(fields_module, "_MOST_BODY_BYTES", 100)
    async with open_api() as (caller, _):
        answer = await caller.post("/v1/completions", complete(prompt="x" * 200))
    assert answer.status == 413


async def test_a_model_that_nobody_serves_is_a_503_that_says_when_to_come_back(open_api):
    async with open_api() as (caller, swarm):
        swarm.hosts[1].online = False
        answer = await caller.post("/v1/completions", complete(stream=True))
    assert answer.status == 503
    assert "3:6" in answer.json["error"]["message"]
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_peers_without_room_are_a_429_within_ten_seconds(open_api, stream):
    async with open_api() as (caller, swarm):
        other = await (await swarm.client()).session(Span(0, BLOCKS), max_length=1024, max_rows=4)
        for row in range(4):
            await other.step(torch.ones(1024, WIDTH), row=row)
        began = trio.current_time()
        answer = await caller.post("/v1/completions", complete(max_tokens=900, stream=stream))
        assert trio.current_time() - began < 10
    assert (answer.status, answer.json["error"]["type"]) == (429, "rate_limit_error")
    assert int(answer.headers["retry-after"]) > 0


async def test_more_requests_than_the_daemon_answers_get_a_429(open_api):
    answers = []

    async with open_api(answering=Answering(1)) as (caller, _):

        async def ask():
            answers.append(await caller.post("/v1/completions", complete()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
    assert sorted(answer.status for answer in answers) == [200, 429]
    busy = next(answer for answer in answers if answer.status == 429)
    assert int(busy.headers["retry-after"]) > 0


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_a_closed_connection_ends_the_session_on_every_peer_within_a_second(open_api, stream):
    async with open_api() as (caller, swarm), trio.open_nursery() as nursery:
        hang_up = trio.Event()
        nursery.start_soon(
            partial(caller.post, hang_up=hang_up), "/v1/completions", complete(max_tokens=900, stream=stream)
        )
        await trio.sleep(0.5)
        assert all(host.server.sessions for host in swarm.hosts)
        hang_up.set()
        await trio.sleep(1)
        assert all(not host.server.sessions for host in swarm.hosts)


async def test_an_error_in_mid_stream_is_an_event_and_no_done(open_api):
    async with open_api() as (caller, swarm):

        async def kill_soon():
            await trio.sleep(0.3)
            swarm.kill(swarm.hosts[1])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill_soon)
            answer = await caller.post("/v1/completions", complete(max_tokens=900, stream=True))
    assert answer.status == 200
    assert "error" in answer.events[-1]
    assert "[DONE]" not in answer.events


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_a_daemon_that_stops_finishes_its_answers_and_refuses_others(open_api, stream):
    answering, answers = Answering(), []
    async with open_api(answering=answering) as (caller, _), trio.open_nursery() as nursery:

        async def ask():
            answers.append(await caller.post("/v1/completions", complete(max_tokens=100, stream=stream)))

        nursery.start_soon(ask)
        await trio.sleep(0.3)
        nursery.start_soon(answering.drain, 60)
        await trio.sleep(0.1)
        refused = await caller.post("/v1/completions", complete())
    assert (refused.status, refused.json["error"]["code"]) == (503, "stopping")
    assert int(refused.headers["retry-after"]) > 0
    [answer] = answers
    assert answer.events[-1] == "[DONE]" if stream else answer.json["usage"]["completion_tokens"] == 100


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_an_answer_that_takes_too_long_for_a_stopping_daemon_ends_with_an_error(open_api, stream):
    answering, answers = Answering(), []
    async with open_api(answering=answering) as (caller, swarm), trio.open_nursery() as nursery:

        async def ask():
            answers.append(await caller.post("/v1/completions", complete(max_tokens=900, stream=stream)))

        nursery.start_soon(ask)
        await trio.sleep(0.3)
        began = trio.current_time()
        await answering.drain(2)
        assert trio.current_time() - began == pytest.approx(2, abs=0.1)
        await trio.sleep(1)
        assert all(not host.server.sessions for host in swarm.hosts)
    [answer] = answers
    error = (answer.events[-1] if stream else answer.json)["error"]
    assert (answer.status, error["code"]) == (200 if stream else 503, "stopping")


async def test_models_are_listed_with_what_a_client_must_know(open_api):
    async with open_api() as (caller, _):
        listed = (await caller.get("/v1/models")).json
        shown = (await caller.get("/v1/models/bytes")).json
        missing = await caller.get("/v1/models/other")
    assert [model["id"] for model in listed["data"]] == ["bytes"]
    assert listed["data"][0] == shown
    assert (shown["max_length"], shown["block_count"]) == (1024, 9)
    assert missing.status == 404


@pytest.mark.parametrize("path", ["/nothing", "/v1/audio/speech", "/v1/completions"])
async def test_what_is_not_there_is_said_in_openai_s_shape(open_api, path):
    async with open_api() as (caller, _):
        answer = await caller.get(path)
    assert answer.status in (404, 405)
    assert (answer.status == 405) == (answer.headers.get("allow") == "POST")
    assert "message" in answer.json["error"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_bias_on_a_token_that_the_model_does_not_have_is_refused(open_api, path):
    make = complete if path == "/v1/completions" else chat
    async with open_api() as (caller, _):
        answers = [await caller.post(path, make(logit_bias={token: 5}, max_tokens=1)) for token in ("256", "257")]
    assert [answer.status for answer in answers] == [200, 400]
    assert answers[1].json["error"]["message"] == "logit_bias: token 257 is not one of the model's 257"
    assert answers[1].json["error"]["param"] == "logit_bias"
