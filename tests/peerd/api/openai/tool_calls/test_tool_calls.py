"""Tool calls over a swarm in memory, whole and streamed, as OpenAI's client reads them."""

from __future__ import annotations

import json

import pytest
import trio
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.fakes.api_fixture import openai_client

TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.arguments.city }}){% endfor %}{% endfor %}"
    "{{ '<assistant>' if add_generation_prompt }}"
)
ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
OSLO = ROME.replace("Rome", "Oslo")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def chat(**fields):
    fields = {"messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL], "max_tokens": 300} | fields
    return {"model": "bytes"} | fields


@pytest.fixture
def answer_of(open_api, scripted_head):
    """`await answer_of(text, **fields)`: the answer of a model that says `text`, as OpenAI's client reads it."""

    async def answer_of(text, *, stream, **fields):
        async with open_api(scripted_head(text), chat_template=TEMPLATE) as (caller, _):
            answer = await caller.post("/v1/chat/completions", chat(stream=stream, **fields))
        assert answer.status == 200, answer.body
        if not stream:
            return ChatCompletion.model_validate(answer.json, strict=True)
        state = ChatCompletionStreamState()
        *pieces, done = answer.events
        assert done == "[DONE]"
        for piece in pieces:
            state.handle_chunk(ChatCompletionChunk.model_validate(piece))
        return state.current_completion_snapshot

    return answer_of


def calls_of(message):
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_calls_are_found_in_what_the_model_says(answer_of, stream):
    completion = await answer_of(f"I look.\n{ROME}\n{OSLO}", stream=stream, n=2)
    for choice in completion.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "I look."
        assert calls_of(choice.message) == [("weather", {"city": "Rome"}), ("weather", {"city": "Oslo"})]
    ids = [call.id for choice in completion.choices for call in choice.message.tool_calls]
    assert len(set(ids)) == 4
    assert all(each.startswith("call_") for each in ids)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_single_call_is_given_if_the_client_wants_no_more(answer_of, stream):
    completion = await answer_of(ROME + OSLO, stream=stream, parallel_tool_calls=False)
    assert calls_of(completion.choices[0].message) == [("weather", {"city": "Rome"})]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("text", ["It rains.\n", "<tool_call>what</tool_call>", ROME[:30]])
async def test_text_that_is_no_call_stays_text(answer_of, text, stream):
    (choice,) = (await answer_of(text, stream=stream)).choices
    assert (choice.message.content, choice.message.tool_calls or [], choice.finish_reason) == (text, [], "stop")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_answer_that_is_cut_off_behind_a_call_says_so(answer_of, stream):
    (choice,) = (await answer_of(f"{ROME} and more", stream=stream, max_tokens=len(ROME) + 2)).choices
    assert len(choice.message.tool_calls) == 1
    assert choice.finish_reason == "length"


NOW = {"type": "function", "function": {"name": "now", "parameters": NO_ARGUMENTS}}
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY | {"additionalProperties": False}}}


@pytest.fixture
def forced(open_api, soft_head):
    """`await forced(**fields)`: the answer of a model that says anything, but for what the request forces."""

    async def forced(template=TEMPLATE, **fields):
        fields = {"temperature": 1.5, "seed": 4, "tools": [WEATHER, NOW]} | fields
        async with open_api(soft_head, chat_template=template) as (caller, _):
            return await caller.post("/v1/chat/completions", chat(**fields))

    return forced


async def test_a_call_is_made_where_one_is_required_and_fits_its_tool(forced):
    answer = await forced(tool_choice="required", parallel_tool_calls=False, n=8, max_tokens=100)
    called = set()
    for choice in ChatCompletion.model_validate(answer.json, strict=True).choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        ((name, arguments),) = calls_of(choice.message)
        called.add(name)
        assert arguments == {} if name == "now" else arguments["city"] in ("Rome", "Oslo")
    assert called == {"weather", "now"}


async def test_a_certain_tool_is_called_and_streamed_alike(forced):
    choice = {"type": "function", "function": {"name": "weather"}}
    whole = await forced(tool_choice=choice)
    (call,) = whole.json["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    events = (await forced(tool_choice=choice, stream=True)).events
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    (streamed,) = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert streamed["function"] == call["function"]


async def test_a_model_that_thinks_may_do_so_before_a_required_call(open_api, scripted_head):
    said = f"<think>Rome, I think.</think>\n{ROME}"
    template = TEMPLATE + "{# <think> #}"
    async with open_api(scripted_head(said), chat_template=template) as (caller, _):
        answer = await caller.post("/v1/chat/completions", chat(tool_choice="required", temperature=0))
    message = answer.json["choices"][0]["message"]
    assert message["reasoning_content"] == "Rome, I think."
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather"]


async def test_with_a_form_an_answer_is_of_this_form_or_a_call(forced):
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [True]}}}
    answer = await forced(response_format=form, parallel_tool_calls=False, n=8, max_tokens=100)
    assert answer.status == 200, answer.body
    said = [(choice["message"]["content"], choice["finish_reason"]) for choice in answer.json["choices"]]
    assert set(said) == {("true", "stop"), (None, "tool_calls")}


async def test_where_a_form_of_calls_cannot_be_forced_that_is_refused(forced):
    template = TEMPLATE.replace("<tool_call>", "[TOOL_CALLS]")
    answer = await forced(template, tool_choice="required")
    assert (answer.status, answer.json["error"]["param"]) == (400, "tool_choice")
    assert answer.json["error"]["message"].endswith("writes calls in a form that has no grammar here: send auto")


async def test_a_tool_s_schema_that_cannot_be_compiled_is_named(forced):
    broken = {"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}
    answer = await forced(tools=[broken], tool_choice="required")
    assert answer.status == 400
    assert "Invalid type: nothing" in answer.json["error"]["message"]


async def test_an_answer_without_text_has_no_content(answer_of):
    assert (await answer_of(ROME, stream=False)).choices[0].message.content is None


async def test_without_tools_a_call_is_text(answer_of):
    (choice,) = (await answer_of(ROME, stream=False, tool_choice="none")).choices
    assert (choice.message.content, choice.message.tool_calls) == (ROME, None)


async def test_a_model_whose_template_has_no_tools_refuses_them(open_api):
    async with open_api() as (caller, _):
        answer = await caller.post("/v1/chat/completions", chat())
    assert (answer.status, answer.json["error"]["param"]) == (400, "tools")
    assert answer.json["error"]["message"] == "bytes's chat template does not use tools: leave them out"


@pytest.mark.real_time
async def test_openai_s_client_goes_from_a_call_to_the_tool_s_answer(
    open_byte_model, open_daemon_of_model, scripted_head
):
    head = scripted_head(ROME)

    def use(client):
        messages = [{"role": "user", "content": "Rome?"}]
        first = client.chat.completions.create(**chat(messages=messages))
        (call,) = first.choices[0].message.tool_calls
        messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
        head.__init__("It rains.")
        with client.chat.completions.stream(**chat(messages=messages)) as stream:
            return call.function.arguments, stream.get_final_completion()

    opening = open_byte_model(head, chat_template=TEMPLATE)
    async with opening as (model, swarm), open_daemon_of_model(model, swarm) as daemon:
        arguments, second = await trio.to_thread.run_sync(use, openai_client(daemon))
    assert json.loads(arguments) == {"city": "Rome"}
    assert second.choices[0].message.content == "It rains."
