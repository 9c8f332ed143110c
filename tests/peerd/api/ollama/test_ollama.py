"""Ollama's API over a swarm in memory: requests, lines, errors, models, and its own client."""

from __future__ import annotations

import json
from functools import partial

import ollama
import pytest
import trio

from peerd.api.errors import ApiError
from peerd.api.fields import Fields
from peerd.api.ollama.requests import read_chat_request, read_generate_request
from tests.fakes.api_fixture import ROME, TEMPLATE, TOKEN

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
HI = [{"role": "user", "content": "Hi"}]


def chat(**fields):
    return {"model": "bytes", "messages": HI} | fields


def generate(**fields):
    return {"model": "bytes", "prompt": "Hi"} | fields


def lines_of(answer):
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.body.endswith(b"\n")
    return [json.loads(line) for line in answer.body.splitlines()]


@pytest.fixture
def answer_of(open_api, scripted_head):
    """`await answer_of(text, asked)`: the lines of a model that says `text`, one where they are not streamed."""

    async def answer_of(text, asked, path="/api/chat"):
        async with open_api(scripted_head(text), chat_template=TEMPLATE) as (caller, _):
            answer = await caller.post(path, asked)
        assert answer.status == 200, answer.body
        return lines_of(answer) if asked.get("stream") is not False else [answer.json]

    return answer_of


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream": False}], ids=["usual", "streamed", "whole"])
async def test_an_answer_is_lines_of_which_the_last_has_counts_and_durations(answer_of, fields):
    lines = await answer_of("good day", chat(**fields))
    *pieces, last = lines
    assert len(pieces) == (0 if fields.get("stream") is False else len("good day"))
    assert "".join(line["message"]["content"] for line in lines) == "good day"
    assert all(line["message"]["role"] == "assistant" and line["model"] == "bytes" for line in lines)
    assert [line["done"] for line in lines] == [False] * len(pieces) + [True]
    assert (last["done_reason"], last["eval_count"]) == ("stop", len("good day") + 1)
    assert last["prompt_eval_count"] == len("<user>Hi<assistant>")
    assert 0 < last["prompt_eval_duration"] < last["total_duration"]
    assert last["prompt_eval_duration"] + last["eval_duration"] == pytest.approx(last["total_duration"], abs=2)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_calls_have_arguments_that_are_objects(answer_of, stream):
    lines = await answer_of(f"I look.\n{ROME}{ROME}", chat(tools=[TOOL], stream=stream))
    assert "".join(line["message"]["content"] for line in lines) == "I look."
    calls = [call for line in lines for call in line["message"].get("tool_calls", [])]
    assert [call["function"] for call in calls] == [
        {"name": "weather", "arguments": {"city": "Rome"}, "index": number} for number in range(2)
    ]
    assert lines[-1]["done_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_prompt_is_a_turn_of_a_chat_unless_it_is_raw(answer_of, stream):
    turn = await answer_of("good day", generate(system="Short.", stream=stream), "/api/generate")
    raw = await answer_of("good day", generate(raw=True, stream=stream, options={"num_predict": 4}), "/api/generate")
    assert "".join(line["response"] for line in turn) == "good day"
    assert turn[-1]["prompt_eval_count"] == len("<system>Short.<user>Hi<assistant>")
    assert "".join(line["response"] for line in raw) == "good"
    assert (raw[-1]["prompt_eval_count"], raw[-1]["done_reason"]) == (len("Hi"), "length")


async def test_a_raw_prompt_without_a_limit_goes_on_to_its_end(answer_of):
    [answer] = await answer_of("twenty letters or so.", generate(raw=True, stream=False), "/api/generate")
    assert answer["response"] == "twenty letters or so."


@pytest.mark.parametrize(("path", "asked"), [("/api/chat", chat(messages=[])), ("/api/generate", generate(prompt=""))])
async def test_nothing_to_answer_only_loads_the_model(open_api, path, asked):
    async with open_api() as (caller, swarm):
        answer = await caller.post(path, asked)
        missing = await caller.post(path, asked | {"model": "other"})
        assert all(not host.task.engine.positions_computed for host in swarm.hosts)
    assert (answer.json["done"], answer.json["done_reason"]) == (True, "load")
    assert missing.status == 404


@pytest.mark.parametrize(
    ("path", "field"), [("/api/tags", "models"), ("/api/ps", "models"), ("/api/version", "version")]
)
async def test_what_clients_ask_for_before_anything_else_is_there(open_api, path, field):
    async with open_api() as (caller, _):
        answer = await caller.get(path)
    assert answer.status == 200
    assert answer.json[field]


async def test_options_are_those_of_chats():
    options = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 7, "repeat_penalty": 1.2}
    options |= {"presence_penalty": 0.1, "frequency_penalty": 0.2, "num_predict": 9, "stop": ["a", "b"]}
    common = read_chat_request(Fields(chat(options=options))).wanted.common
    assert (common.max_tokens, common.stop, common.stream) == (9, ("a", "b"), True)
    assert {name: value for name, value in common.sampling.items() if value} == {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 7,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
    }


async def test_what_asks_for_nothing_is_accepted():
    options = {"num_ctx": 4096, "num_gpu": 99, "num_thread": 4, "mirostat": 0, "repeat_last_n": 64, "num_predict": -1}
    usual = {"format": "", "keep_alive": "5m", "truncate": True, "logprobs": False, "options": options}
    assert read_chat_request(Fields(chat(**usual))).wanted.common.max_tokens is None
    assert read_generate_request(Fields(generate(**usual, suffix="", template="", images=[], context=[]))).wanted
    assert read_chat_request(Fields(chat(think=False))).wanted.template.variables == {"enable_thinking": False}
    assert read_chat_request(Fields(chat(think="high"))).wanted.template.effort == "high"


async def test_what_tools_said_answers_calls_by_their_names_in_their_order():
    other = {"function": {"name": "time", "arguments": {}}}
    messages = [
        *HI,
        {"role": "assistant", "content": "", "thinking": "?", "tool_calls": [CALL, other, CALL]},
        {"role": "tool", "tool_name": "time", "content": "Noon."},
        {"role": "tool", "tool_name": "weather", "content": "Rain."},
        {"role": "tool", "content": "Sun."},
    ]
    found = read_chat_request(Fields(chat(messages=messages))).wanted.messages
    ids = [call["id"] for call in found[1]["tool_calls"]]
    assert len(set(ids)) == 3
    assert found[1]["reasoning_content"] == "?"
    assert [message["tool_call_id"] for message in found[2:]] == [ids[1], ids[0], ids[2]]
    assert found[1]["tool_calls"][0]["function"]["values"] == {"city": "Rome"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"role": "robot"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "", "images": ["aaaa"]}]}, "messages[0].images"),
        ({"messages": [{"role": "tool", "content": "", "tool_name": "x"}]}, "messages[0].tool_name"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"options": {"temperature": 3}}, "options.temperature"),
        ({"options": {"num_predict": 0}}, "options.num_predict"),
        ({"options": {"num_predict": -2}}, "options.num_predict"),
        ({"options": {"stop": [""]}}, "options.stop"),
        ({"options": {"mirostat": 2}}, "options.mirostat"),
        ({"options": {"temprature": 1}}, "options.temprature"),
        ({"options": {"repeat_penalty": 1.1, "repeat_last_n": 64}}, "options.repeat_last_n"),
        ({"stream": "no"}, "stream"),
        ({"format": "xml"}, "format"),
        ({"think": 3}, "think"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"logprobs": True}, "logprobs"),
        ({"wrong": 1}, "wrong"),
    ],
)
async def test_a_field_that_is_refused_is_named_as_the_client_wrote_it(fields, param):
    with pytest.raises(ApiError) as caught:
        read_chat_request(Fields(chat(**fields)))
    assert caught.value.param == param
    assert str(caught.value).startswith(param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 3}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"context": [1]}, "context"),
        ({"images": ["aaaa"]}, "images"),
        ({"raw": True, "system": "Short."}, "system"),
        ({"raw": True, "options": {"temperature": "hot"}}, "options.temperature"),
        ({"tools": [TOOL]}, "tools"),
    ],
)
async def test_a_field_of_a_prompt_that_is_refused_is_named(fields, param):
    with pytest.raises(ApiError) as caught:
        read_generate_request(Fields(generate(**fields)))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/api/chat", chat(model="other"), 404, "there is no model 'other' here"),
        ("/api/chat", chat(options={"num_predict": 5000}), 400, "maximum context length is 1024"),
        ("/api/chat", chat(think="high"), 400, "bytes has no think"),
        ("/api/generate", b'{"prompt": "\\ud800"}', 400, "prompt has half a character"),
        ("/api/generate", b'{"seed": NaN}', 400, "NaN is not a JSON number"),
        ("/api/show", {}, 400, "model is missing"),
        ("/api/pull", {}, 404, "there is no /api/pull here"),
    ],
)
async def test_errors_have_ollama_s_form(open_api, path, body, status, said):
    async with open_api() as (caller, _):
        answer = await (caller.post_bytes if isinstance(body, bytes) else caller.post)(path, body)
    assert answer.status == status
    assert list(answer.json) == ["error"]
    assert said in answer.json["error"]


async def test_an_error_in_mid_stream_is_the_last_line(open_api):
    async with open_api() as (caller, swarm), trio.open_nursery() as nursery:

        async def kill_soon():
            await trio.sleep(0.3)
            swarm.kill(swarm.hosts[1])

        nursery.start_soon(kill_soon)
        answer = await caller.post("/api/chat", chat(options={"num_predict": 900}))
    *_, last = lines_of(answer)
    assert "3:6" in last["error"]


async def test_a_closed_connection_ends_the_session_on_every_peer(open_api):
    async with open_api() as (caller, swarm), trio.open_nursery() as nursery:
        hang_up = trio.Event()
        nursery.start_soon(partial(caller.post, hang_up=hang_up), "/api/chat", chat(options={"num_predict": 900}))
        await trio.sleep(0.5)
        assert all(host.server.sessions for host in swarm.hosts)
        hang_up.set()
        await trio.sleep(1)
        assert all(not host.server.sessions for host in swarm.hosts)


async def test_a_model_says_what_it_can(open_api):
    async with open_api(chat_template=TEMPLATE) as (caller, _):
        able = (await caller.post("/api/show", {"model": "bytes:latest"})).json
    async with open_api(chat_template=None) as (caller, _):
        plain = (await caller.post("/api/show", {"name": "bytes"})).json
    assert able["capabilities"] == ["completion", "embedding", "tools", "thinking"]
    assert able["template"] == TEMPLATE
    assert plain["capabilities"] == ["completion", "embedding"]


@pytest.mark.real_time
async def test_ollama_s_client_lists_shows_chats_and_generates(open_byte_model, open_daemon_of_model, scripted_head):
    head = scripted_head(f"I look.{ROME}")

    def use(client):
        [model] = client.list().models
        [running] = client.ps().models
        shown = client.show(model.model)
        first = client.chat(model="bytes:latest", messages=HI, tools=[TOOL]).message
        head.__init__("It rains.")
        messages = [*HI, first, {"role": "tool", "tool_name": "weather", "content": "Rain."}]
        *_, last = streamed = list(client.chat(model="bytes", messages=messages, tools=[TOOL], stream=True))
        head.__init__("Yes.")
        generated = client.generate(model="bytes", prompt="Sure?", options={"temperature": 0})
        with pytest.raises(ollama.ResponseError, match="no model 'other'") as caught:
            client.show("other")
        assert caught.value.status_code == 404
        text = "".join(piece.message.content for piece in streamed)
        return model, running, shown, first, text, last, generated

    opening = open_byte_model(head, chat_template=TEMPLATE)
    async with opening as (model, swarm), open_daemon_of_model(model, swarm) as daemon:
        with ollama.Client(daemon.url, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            model, running, shown, first, text, last, generated = await trio.to_thread.run_sync(use, client)
    assert (model.model, running.context_length) == ("bytes", 1024)
    assert shown.modelinfo["general.architecture"] == model.details.family
    [call] = first.tool_calls
    assert (first.content, call.function.name, call.function.arguments) == ("I look.", "weather", {"city": "Rome"})
    assert (text, last.done_reason, last.eval_count) == ("It rains.", "stop", 10)
    assert generated.response == "Yes."
