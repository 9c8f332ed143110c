"""OpenAI's responses over a swarm in memory: requests, events, what is kept, errors, and its own client."""

from __future__ import annotations

import json
import time
from functools import partial

import openai
import pytest
import trio
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from peerd.api.errors import ApiError
from peerd.api.fields import Fields
from peerd.api.responses.requests import read_responses_request
from peerd.api.responses.store import KEPT_S, ResponseStore, memory_of
from tests.fakes.api_fixture import ROME, TEMPLATE, openai_client

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": False}
CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Rome"}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "Rain."}
EVENTS = TypeAdapter(ResponseStreamEvent)
TEXT_EVENTS = [
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
CALL_EVENTS = [
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]


def ask(**fields):
    return {"model": "bytes", "input": "Hi", "max_output_tokens": 300} | fields


def read(**fields):
    return read_responses_request(Fields(ask(**fields)), ResponseStore(time.monotonic))


def events_of(answer):
    """The events as OpenAI's types have them, after a check of their names and numbers."""
    events = []
    for number, block in enumerate(answer.body.decode().split("\n\n")[:-1]):
        name, data = block.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert (name, value["sequence_number"]) == (f"event: {value['type']}", number)
        events.append(EVENTS.validate_python(value))
    return events


def kinds_of(events):
    """The events' types, with runs of the same type once."""
    kinds = [event.type for event in events]
    return [kind for number, kind in enumerate(kinds) if number == 0 or kinds[number - 1] != kind]


@pytest.fixture
def answer_of(open_api, scripted_head):
    """`await answer_of(text, **fields)`: the response, and the types of its events, of a model that says `text`."""

    async def answer_of(text, *, stream, **fields):
        async with open_api(scripted_head(text), chat_template=TEMPLATE) as (caller, _):
            answer = await caller.post(PATH, ask(stream=stream, **fields))
        assert answer.status == 200, answer.body
        if not stream:
            return Response.model_validate(answer.json), None
        events = events_of(answer)
        return events[-1].response, kinds_of(events)

    return answer_of


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_answer_is_an_item_with_text(answer_of, stream):
    response, kinds = await answer_of("good day", stream=stream, instructions="Short.", metadata={"a": "b"})
    [item] = response.output
    assert (response.output_text, item.role, item.status) == ("good day", "assistant", "completed")
    assert (response.status, response.incomplete_details, response.error) == ("completed", None, None)
    assert (response.instructions, response.metadata, response.model) == ("Short.", {"a": "b"}, "bytes")
    prompt = len("<system>Short.<user>Hi<assistant>")
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (prompt, 9, prompt + 9)
    if stream:
        assert kinds == ["response.created", "response.in_progress", *TEXT_EVENTS, "response.completed"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_answer_that_was_cut_off_is_incomplete(answer_of, stream):
    response, kinds = await answer_of("good day", stream=stream, max_output_tokens=4)
    assert (response.output_text, response.output[0].status) == ("good", "incomplete")
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert kinds is None or kinds[-1] == "response.incomplete"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_calls_are_items_of_their_own(answer_of, stream):
    response, kinds = await answer_of(f"I look.\n{ROME}{ROME}", stream=stream, tools=[TOOL])
    message, *calls = response.output
    assert message.content[0].text == "I look."
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", {"city": "Rome"})] * 2
    assert len({call.call_id for call in calls} | {call.id for call in calls}) == 4
    if stream:
        assert kinds[2:-1] == TEXT_EVENTS + CALL_EVENTS * 2


async def test_deltas_are_the_text(open_api, scripted_head):
    async with open_api(scripted_head("\u65e5 yes")) as (caller, _):
        events = events_of(await caller.post(PATH, ask(stream=True)))
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == events[-1].response.output_text == "\u65e5 yes"
    assert events[0].response.output == []


async def test_items_become_messages():
    parts = [{"type": "output_text", "text": "I ", "annotations": []}, {"type": "output_text", "text": "look."}]
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
        {"type": "message", "role": "user", "content": "Rome?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": parts},
        CALL | {"id": "fc_1", "status": "completed"},
        CALL | {"call_id": "c2"},
        OUTPUT,
        OUTPUT | {"call_id": "c2", "output": [{"type": "input_text", "text": "Sun."}]},
    ]
    found = read(input=items, instructions="Short.").chat.messages
    assert [call["id"] for call in found[3].pop("tool_calls")] == ["c1", "c2"]
    assert found == [
        {"role": "system", "content": "Short."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm."},
        {"role": "tool", "content": "Rain.", "tool_call_id": "c1", "name": "weather"},
        {"role": "tool", "content": "Sun.", "tool_call_id": "c2", "name": "weather"},
    ]


@pytest.mark.parametrize(
    ("choice", "must_call"),
    [("required", ("weather", "time")), ({"type": "function", "name": "time"}, ("time",)), ("auto", ())],
)
async def test_a_client_may_require_a_call(choice, must_call):
    assert read(tools=[TOOL, TOOL | {"name": "time"}], tool_choice=choice).chat.tools.must_call == must_call


async def test_what_asks_for_nothing_is_accepted():
    wanted = read(
        background=False,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="k",
        client_metadata={"a": "b"},
        reasoning={"summary": "auto"},
        service_tier="auto",
        store=False,
        stream_options={"include_obfuscation": False},
        text={"format": {"type": "text"}, "verbosity": "medium"},
        tool_choice="auto",
        tools=[TOOL, {"type": "web_search"}, {"type": "namespace", "name": "n", "tools": []}],
        truncation="disabled",
    )
    assert [tool["function"]["name"] for tool in wanted.chat.tools.tools] == ["weather"]
    assert not wanted.is_kept


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"role": "robot", "content": ""}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": 3}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id"),
        ({"input": [OUTPUT]}, "input[0].call_id"),
        ({"input": [CALL | {"arguments": "[]"}]}, "input[0].arguments"),
        ({"input": [CALL | {"name": ""}]}, "input[0].name"),
        ({"input": [CALL, OUTPUT | {"output": 3}]}, "input[1].output"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "time"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tools": [{"type": "web_search"}, TOOL | {"name": "a b"}]}, "tools[1].name"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {}}}, "text.format.type"),
        ({"reasoning": {"effort": 3}}, "reasoning.effort"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]"),
        ({"truncation": "auto"}, "truncation"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
        ({"store": "yes"}, "store"),
        ({"messages": []}, "messages"),
    ],
)
async def test_a_field_that_is_refused_is_named_as_the_client_wrote_it(fields, param):
    with pytest.raises(ApiError) as caught:
        read(**fields)
    assert caught.value.param == param
    assert str(caught.value).startswith(param)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_conversation_goes_on_from_a_response_without_its_instructions(open_api, scripted_head, stream):
    async with open_api(scripted_head("So be it."), chat_template=TEMPLATE) as (caller, _):
        first = await caller.post(PATH, ask(instructions="Short.", stream=stream))
        first_id = (events_of(first)[-1].response if stream else Response.model_validate(first.json)).id
        second = await caller.post(PATH, ask(input="Why?", previous_response_id=first_id))
        third = await caller.post(PATH, ask(input="How?", previous_response_id=second.json["id"]))
    prompt = "<user>Hi<assistant>So be it.<user>Why?<assistant>"
    assert second.json["usage"]["input_tokens"] == len(prompt)
    assert third.json["usage"]["input_tokens"] > len(prompt)
    assert second.json["previous_response_id"] == first_id


async def test_a_call_is_answered_by_what_its_tool_says(open_api, scripted_head):
    async with open_api(scripted_head(ROME), chat_template=TEMPLATE) as (caller, _):
        first = (await caller.post(PATH, ask(tools=[TOOL]))).json
        answer = OUTPUT | {"call_id": first["output"][0]["call_id"]}
        second = await caller.post(PATH, ask(tools=[TOOL], input=[answer], previous_response_id=first["id"]))
        wrong = await caller.post(PATH, ask(tools=[TOOL], input=[OUTPUT], previous_response_id=first["id"]))
    assert second.status == 200
    assert (wrong.status, wrong.json["error"]["param"]) == (400, "input[0].call_id")


async def test_items_of_a_response_may_be_sent_as_their_ids(open_api, scripted_head):
    async with open_api(scripted_head(f"I look.{ROME}"), chat_template=TEMPLATE) as (caller, _):
        first = (await caller.post(PATH, ask(tools=[TOOL]))).json
        items = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
        answer = OUTPUT | {"call_id": first["output"][1]["call_id"]}
        by_id = await caller.post(PATH, ask(tools=[TOOL], input=[*items, answer]))
        whole = await caller.post(PATH, ask(tools=[TOOL], input=[*first["output"], answer]))
        await caller.request("DELETE", f"{PATH}/{first['id']}")
        gone = await caller.post(PATH, ask(tools=[TOOL], input=[*items, answer]))
    assert by_id.status == 200
    assert by_id.json["usage"]["input_tokens"] == whole.json["usage"]["input_tokens"]
    assert (gone.status, gone.json["error"]["param"]) == (400, "input[0].id")


async def test_responses_are_shown_and_deleted_while_they_are_kept(open_api):
    async with open_api() as (caller, _):
        kept = (await caller.post(PATH, ask(max_output_tokens=2))).json
        unkept = (await caller.post(PATH, ask(max_output_tokens=2, store=False))).json
        shown = await caller.get(f"{PATH}/{kept['id']}")
        hidden = await caller.get(f"{PATH}/{unkept['id']}")
        deleted = await caller.request("DELETE", f"{PATH}/{kept['id']}")
        again = await caller.request("DELETE", f"{PATH}/{kept['id']}")
        refused = await caller.post(PATH, ask(previous_response_id=kept["id"]))
    assert shown.json == kept
    assert (hidden.status, again.status) == (404, 404)
    assert deleted.json == {"id": kept["id"], "object": "response", "deleted": True}
    assert (refused.status, refused.json["error"]["code"]) == (400, "previous_response_not_found")


def test_a_response_is_kept_for_an_hour_and_the_oldest_make_room():
    now = [0.0]
    store = ResponseStore(lambda: now[0], most_responses=3, most_bytes=100)
    for name, size in (("a", 10), ("b", 10), ("c", 10), ("d", 10)):
        store.keep({"id": name, "output": [{"id": f"item {name}"}]}, (), size)
    assert [store.get(name) is not None for name in "abcd"] == [False, True, True, True]
    assert [store.item(f"item {name}") is not None for name in "abcd"] == [False, True, True, True]
    store.keep({"id": "e", "output": []}, (), 85)
    assert [store.get(name) is not None for name in "cde"] == [False, True, True]
    store.keep({"id": "f", "output": []}, (), 101)
    assert [store.get(name) is not None for name in "def"] == [False, False, False]
    store.keep({"id": "g", "output": []}, (), 100)
    now[0] = KEPT_S - 1
    assert store.get("g") is not None
    now[0] = KEPT_S
    assert store.get("g") is None
    store.keep({"id": "h", "output": []}, (), 100)
    assert repr(store) == "<ResponseStore 1 responses, 100 bytes>"


def test_the_memory_of_a_value_counts_all_that_is_in_it():
    assert memory_of({"a": ["x" * 1000, {"b": "y" * 1000}]}) > 2000
    assert read(input="x" * 5000).size_bytes > 5000
    assert read(input="x" * 5000, store=False).size_bytes == 0


async def test_an_error_in_mid_stream_is_a_failed_response(open_api):
    async with open_api() as (caller, swarm), trio.open_nursery() as nursery:

        async def kill_soon():
            await trio.sleep(0.3)
            swarm.kill(swarm.hosts[1])

        nursery.start_soon(kill_soon)
        answer = await caller.post(PATH, ask(max_output_tokens=900, stream=True))
        response = events_of(answer)[-1].response
        missing = await caller.get(f"{PATH}/{response.id}")
    assert (response.status, response.error.code) == ("failed", "server_error")
    assert "3:6" in response.error.message
    assert missing.status == 404


async def test_a_closed_connection_ends_the_session_on_every_peer(open_api):
    async with open_api() as (caller, swarm), trio.open_nursery() as nursery:
        hang_up = trio.Event()
        post = partial(caller.post, hang_up=hang_up)
        nursery.start_soon(post, PATH, ask(max_output_tokens=900, stream=True))
        await trio.sleep(0.5)
        assert all(host.server.sessions for host in swarm.hosts)
        hang_up.set()
        await trio.sleep(1)
        assert all(not host.server.sessions for host in swarm.hosts)


@pytest.mark.real_time
async def test_openai_s_client_creates_streams_retrieves_and_deletes(
    open_byte_model, open_daemon_of_model, scripted_head
):
    head = scripted_head(f"I look.{ROME}")

    def use(client):
        first = client.responses.create(**ask(tools=[TOOL]))
        *_, call = first.output
        head.__init__("It rains.")
        answer = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
        asked = ask(tools=[TOOL], input=[answer], previous_response_id=first.id)
        with client.responses.stream(**asked) as stream:
            second = stream.get_final_response()
        head.__init__("Yes.")
        third = client.responses.create(**ask(input=[*map(dict, second.output), {"role": "user", "content": "Sure?"}]))
        same = client.responses.retrieve(third.id)
        client.responses.delete(third.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(third.id)
        with pytest.raises(openai.BadRequestError, match="input"):
            client.responses.create(**ask(input=[]))
        return call, second, third, same

    opening = open_byte_model(head, chat_template=TEMPLATE)
    async with opening as (model, swarm), open_daemon_of_model(model, swarm) as daemon:
        with openai_client(daemon, "tcp") as client:
            call, second, third, same = await trio.to_thread.run_sync(use, client)
    assert json.loads(call.arguments) == {"city": "Rome"}
    assert (second.output_text, third.output_text) == ("It rains.", "Yes.")
    assert same == third
