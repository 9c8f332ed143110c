"""Anthropic's API over a swarm in memory: requests, answers, events, errors, and its own client."""

from __future__ import annotations

import asyncio
import json
from functools import partial

import anthropic
import pytest
import trio

from peerd.api.anthropic.requests import read_messages_request
from peerd.api.errors import ApiError
from peerd.api.fields import Fields
from tests.fakes.api_fixture import ROME, TEMPLATE, TOKEN

TOOL = {"name": "weather", "input_schema": {"type": "object", "properties": {}}}
USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "Rain."}]}


def ask(**fields):
    return {"model": "bytes", "max_tokens": 300, "messages": [{"role": "user", "content": "Hi"}]} | fields


def read(**fields):
    return read_messages_request(Fields(ask(**fields))).chat


def said(*content):
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": list(content)}]


def text(words):
    return {"type": "text", "text": words}


@pytest.fixture
def answer_of(open_api, scripted_head):
    """`await answer_of(text, **fields)`: the answer of a model that says `text`, whole or put together from events."""

    async def answer_of(text, *, stream, **fields):
        async with open_api(scripted_head(text), chat_template=TEMPLATE) as (caller, _):
            answer = await caller.post("/v1/messages", ask(stream=stream, **fields))
        assert answer.status == 200, answer.body
        return message_of(answer.body) if stream else answer.json

    return answer_of


def events_of(body):
    """The events, after a check that each has its type as its name."""
    events = []
    for block in body.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def message_of(body):
    """What Anthropic's client makes of the events."""
    start, ping, *events = events_of(body)
    message, usage = start["message"], start["message"]["usage"]
    assert (start["type"], ping["type"], message["content"]) == ("message_start", "ping", [])
    open_block, inputs = None, {}
    for event in events:
        kind = event["type"]
        if kind == "content_block_start":
            assert open_block is None
            assert event["index"] == len(message["content"])
            open_block = event["index"]
            message["content"].append(event["content_block"])
        elif kind == "content_block_delta":
            assert event["index"] == open_block
            delta = event["delta"]
            if delta["type"] == "input_json_delta":
                inputs[open_block] = inputs.get(open_block, "") + delta["partial_json"]
            else:
                message["content"][open_block]["text"] += delta["text"]
        elif kind == "content_block_stop":
            assert event["index"] == open_block
            open_block = None
        elif kind == "message_delta":
            assert open_block is None
            message |= event["delta"] | {"usage": usage | event["usage"]}
    assert events[-1]["type"] == "message_stop"
    for index, given in inputs.items():
        message["content"][index]["input"] = json.loads(given)
    return message


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_answer_is_a_message(answer_of, stream):
    message = await answer_of("good day", stream=stream, system="Short.")
    assert message["content"] == [text("good day")]
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "bytes")
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    prompt = "<system>Short.<user>Hi<assistant>"
    assert message["usage"] == {
        "input_tokens": len(prompt),
        "cache_read_input_tokens": 0,
        "cache_creation_input_tokens": 0,
        "output_tokens": len("good day") + 1,
    }
    assert message["id"].startswith("msg_")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("fields", "words", "reason", "sequence"),
    [
        ({"max_tokens": 4}, "one ", "max_tokens", None),
        ({"stop_sequences": ["zero", " th"]}, "one two", "stop_sequence", " th"),
    ],
)
async def test_what_ended_an_answer_is_said(answer_of, stream, fields, words, reason, sequence):
    message = await answer_of("one two three", stream=stream, **fields)
    assert message["content"] == [text(words)]
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_calls_are_blocks_of_their_own(answer_of, stream):
    message = await answer_of(f"I look.\n{ROME}{ROME}", stream=stream, tools=[TOOL])
    first, *calls = message["content"]
    assert first == text("I look.")
    assert [(call["type"], call["name"], call["input"]) for call in calls] == [
        ("tool_use", "weather", {"city": "Rome"})
    ] * 2
    assert calls[0]["id"] != calls[1]["id"]
    assert message["stop_reason"] == "tool_use"


async def test_one_call_is_made_if_the_client_wants_no_more(answer_of):
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = await answer_of(ROME + ROME, stream=False, tools=[TOOL], tool_choice=choice)
    assert [block["type"] for block in message["content"]] == ["tool_use"]


@pytest.mark.parametrize(
    ("choice", "must_call"),
    [({"type": "any"}, ("weather", "time")), ({"type": "tool", "name": "time"}, ("time",)), ({"type": "auto"}, ())],
)
async def test_a_client_may_require_a_call(choice, must_call):
    assert read(tools=[TOOL, TOOL | {"name": "time"}], tool_choice=choice).tools.must_call == must_call


async def test_blocks_become_the_messages_that_templates_know():
    messages = [
        {"role": "user", "content": [text("Be kind."), text("Rome?")]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "?", "signature": ""}, text("I"), USE]},
        {"role": "user", "content": [RESULT, text("And?")]},
        {"role": "system", "content": "Soon over."},
        {"role": "user", "content": []},
    ]
    found = read(messages=messages, system=[text("A."), text("B.") | {"cache_control": {"type": "ephemeral"}}]).messages
    calls = found[2].pop("tool_calls")
    assert found == [
        {"role": "system", "content": "A.\n\nB."},
        {"role": "user", "content": "Be kind.\n\nRome?"},
        {"role": "assistant", "content": "I", "reasoning_content": "?"},
        {"role": "tool", "content": "Rain.", "tool_call_id": "t1", "name": "weather"},
        {"role": "user", "content": "And?"},
        {"role": "system", "content": "Soon over."},
        {"role": "user", "content": ""},
    ]
    assert calls[0]["function"]["values"] == {"city": "Rome"}


async def test_a_tool_that_failed_says_so():
    failed = [{"role": "user", "content": [RESULT | {"is_error": True, "content": "No net."}]}]
    assert read(messages=said(USE) + failed).messages[-1]["content"] == "Error: No net."


async def test_a_last_message_of_the_assistant_is_continued():
    options = read(messages=said(text("Hel"))).template
    assert (options.continues_last, options.opens_answer) == (True, False)
    assert not read(messages=[*said(USE), {"role": "user", "content": [RESULT]}]).template.continues_last


async def test_what_asks_for_nothing_is_accepted():
    usual = {
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "thinking": {"type": "adaptive", "display": "summarized"},
        "output_config": {"effort": "high"},
        "tools": [TOOL | {"type": "custom", "cache_control": {"type": "ephemeral"}, "eager_input_streaming": True}],
        "tool_choice": {"type": "none"},
        "mcp_servers": [],
    }
    assert read(**usual).tools is None
    assert read(thinking={"type": "disabled"}).template.variables == {"enable_thinking": False}
    assert read(output_config={"effort": "low"}).template.effort == "low"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "Hi", "name": "Ann"}]}, "messages[0].name"),
        ({"messages": said({"type": "image", "source": {}})}, "messages[1].content[0].type"),
        ({"messages": said(text(3))}, "messages[1].content[0].text"),
        ({"messages": said(USE | {"input": "Rome"})}, "messages[1].content[0].input"),
        ({"messages": said(text(""), USE | {"name": ""})}, "messages[1].content[1].name"),
        (
            {"messages": [*said(), {"role": "user", "content": [text(""), RESULT]}]},
            "messages[2].content[1].tool_use_id",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].type"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"temperature": 3}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tools": [TOOL | {"name": "a b"}]}, "tools[0].name"),
        ({"tools": [TOOL | {"input_schema": 3}]}, "tools[0].input_schema"),
        ({"tools": [{"type": "web_search_20260318", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL | {"input_examples": [{}]}]}, "tools[0].input_examples"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tools": [TOOL], "tool_choice": {"type": "must"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "time"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0].type"),
        ({"output_config": {"format": {"type": "grammar"}}}, "output_config.format.type"),
        ({"container": "c"}, "container"),
        ({"logprobs": True}, "logprobs"),
    ],
)
async def test_a_field_that_is_refused_is_named_as_the_client_wrote_it(fields, param):
    with pytest.raises(ApiError) as caught:
        read(**fields)
    assert caught.value.param == param
    assert str(caught.value).startswith(f"{param} ")


@pytest.mark.parametrize(
    ("body", "status", "kind", "said"),
    [
        (ask(model="other"), 404, "not_found_error", "there is no model 'other' here"),
        (ask(max_tokens=5000), 400, "invalid_request_error", "maximum context length is 1024 tokens"),
        (ask(tools=[TOOL]), 400, "invalid_request_error", "chat template does not use tools"),
        (ask(output_config={"effort": "max"}), 400, "invalid_request_error", "output_config.effort"),
        (b'{"model": NaN}', 400, "invalid_request_error", "NaN is not a JSON number"),
        (b'{"system": "\\ud83d"}', 400, "invalid_request_error", "system has half a character"),
        (b'{"a":' * 200, 400, "invalid_request_error", "not JSON"),
    ],
    ids=["model", "context", "tools", "effort", "NaN", "half", "deep"],
)
async def test_errors_have_anthropic_s_form(open_api, body, status, kind, said):
    async with open_api() as (caller, swarm):
        post = caller.post_bytes if isinstance(body, bytes) else caller.post
        answer = await post("/v1/messages", body)
        assert all(not host.server.sessions for host in swarm.hosts)
    assert (answer.status, answer.json["type"], answer.json["error"]["type"]) == (status, "error", kind)
    assert said in answer.json["error"]["message"]


async def test_an_error_in_mid_stream_is_the_last_event(open_api):
    async with open_api() as (caller, swarm), trio.open_nursery() as nursery:

        async def kill_soon():
            await trio.sleep(0.3)
            swarm.kill(swarm.hosts[1])

        nursery.start_soon(kill_soon)
        answer = await caller.post("/v1/messages", ask(max_tokens=900, stream=True))
    *_, last = events_of(answer.body)
    assert (last["type"], last["error"]["type"]) == ("error", "overloaded_error")


async def test_a_closed_connection_ends_the_session_on_every_peer(open_api):
    async with open_api() as (caller, swarm), trio.open_nursery() as nursery:
        hang_up = trio.Event()
        post = partial(caller.post, hang_up=hang_up)
        nursery.start_soon(post, "/v1/messages", ask(max_tokens=900, stream=True))
        await trio.sleep(0.5)
        assert all(host.server.sessions for host in swarm.hosts)
        hang_up.set()
        await trio.sleep(1)
        assert all(not host.server.sessions for host in swarm.hosts)


async def test_tokens_are_counted_as_the_model_reads_them(open_api):
    async with open_api() as (caller, swarm):
        counted = await caller.post("/v1/messages/count_tokens", ask(max_tokens=None, system="Short."))
        refused = await caller.post("/v1/messages/count_tokens", ask(messages=3))
        assert all(not host.task.engine.positions_computed for host in swarm.hosts)
    assert counted.json == {"input_tokens": len("<system>Short.<user>Hi<assistant>")}
    assert (refused.status, refused.json["type"]) == (400, "error")


@pytest.mark.real_time
async def test_anthropic_s_client_calls_a_tool_and_streams_what_follows(
    open_byte_model, open_daemon_of_model, scripted_head
):
    head = scripted_head(f"I look.{ROME}")

    def use(daemon):
        with anthropic.Anthropic(base_url=daemon.url, api_key=TOKEN, max_retries=0) as client:
            first = client.messages.create(**ask(tools=[TOOL]))
            *_, call = first.content
            result = {"type": "tool_result", "tool_use_id": call.id, "content": "Rain."}
            turns = [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
            asked = ask(tools=[TOOL], messages=[*ask()["messages"], *turns])
            count = client.messages.count_tokens(**{name: asked[name] for name in ("model", "tools", "messages")})
            head.__init__("It rains.")
            with client.messages.stream(**asked) as stream:
                streamed = "".join(stream.text_stream)
                return call, count, streamed, stream.get_final_message()

    opening = open_byte_model(head, chat_template=TEMPLATE)
    async with opening as (model, swarm), open_daemon_of_model(model, swarm) as daemon:
        call, count, streamed, message = await trio.to_thread.run_sync(use, daemon)
    assert (call.name, call.input) == ("weather", {"city": "Rome"})
    assert (streamed, message.stop_reason) == ("It rains.", "end_turn")
    assert message.usage.input_tokens == count.input_tokens


@pytest.mark.real_time
async def test_anthropic_s_asynchronous_client_streams_and_raises(open_daemon):
    async with open_daemon() as daemon:

        async def use():
            async with anthropic.AsyncAnthropic(base_url=daemon.url, auth_token=TOKEN, max_retries=0) as client:
                events = [event async for event in await client.messages.create(**ask(max_tokens=5, stream=True))]
                with pytest.raises(anthropic.BadRequestError, match="max_tokens must be"):
                    await client.messages.create(**ask(max_tokens=-1))
                [listed] = [model async for model in client.models.list()]
                assert (listed.id, listed.display_name, listed.type) == ("bytes", "bytes", "model")
                with pytest.raises(anthropic.NotFoundError):
                    await client.messages.create(**ask(model="other"))
            async with anthropic.AsyncAnthropic(base_url=daemon.url, api_key="wrong", max_retries=0) as stranger:
                with pytest.raises(anthropic.AuthenticationError):
                    await stranger.messages.create(**ask())
            return events

        events = await trio.to_thread.run_sync(lambda: asyncio.run(use()))
    assert events[0].message.usage.input_tokens == len("<user>Hi<assistant>")
    assert events[-2].usage.output_tokens == 5
    assert [events[-2].delta.stop_reason, events[-1].type] == ["max_tokens", "message_stop"]
