"""Answers in a form that the client asks for, over a swarm in memory and as OpenAI's client reads them."""

from __future__ import annotations

import json
import re
from typing import Literal

import pytest
import trio
from pydantic import BaseModel, Field

from peerd.protocol.errors import InvalidRequest
from tests.fakes.api_fixture import openai_client

MESSAGES = [{"role": "user", "content": "Who?"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "city": {"enum": ["Rome", "Oslo"]}},
    "required": ["name", "city"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


def chat(**fields):
    return {"model": "bytes", "messages": MESSAGES, "max_tokens": 300, "temperature": 1.5, "seed": 5} | fields


@pytest.fixture
def ask(open_api, soft_head):
    """`await ask(path, body)`: what the API answers, whole or as the joined texts of a stream."""

    async def ask(body, path="/v1/chat/completions", head=None):
        async with open_api(head or soft_head) as (caller, swarm):
            answer = await caller.post(path, body)
            await trio.sleep(1)
            assert all(host.server.sessions == 0 for host in swarm.hosts)
        return answer

    return ask


def texts_of(answer):
    return [choice["message"]["content"] for choice in answer.json["choices"]]


async def test_every_answer_keeps_to_the_schema_and_ends_by_itself(ask):
    answer = await ask(chat(response_format=JSON_SCHEMA, n=3))
    for text in texts_of(answer):
        value = json.loads(text)
        assert list(value) == ["name", "city"]
        assert value["city"] in ("Rome", "Oslo")
    assert len(set(texts_of(answer))) > 1
    assert [choice["finish_reason"] for choice in answer.json["choices"]] == ["stop"] * 3


async def test_a_seed_gives_the_same_answer_whole_streamed_and_with_logprobs(ask):
    whole = texts_of(await ask(chat(response_format=JSON_SCHEMA)))
    with_logprobs = await ask(chat(response_format=JSON_SCHEMA, logprobs=True, top_logprobs=2))
    events = (await ask(chat(response_format=JSON_SCHEMA, stream=True))).events
    assert events[-1] == "[DONE]"
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert texts_of(with_logprobs) == whole == ["".join(pieces)]
    logprobs = with_logprobs.json["choices"][0]["logprobs"]["content"]
    # They are the model's own, which would have said something else.
    assert any(each["top_logprobs"][0]["logprob"] > each["logprob"] for each in logprobs)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "regex", "regex": "[a-f]{3}-[0-9]{2}"}}, "[a-f]{3}-[0-9]{2}"),
        ({"response_format": {"type": "grammar", "grammar": 'root ::= "x" [0-9] y\ny ::= "!" | "?"'}}, "x[0-9][!?]"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'start: "a" /[bc]{2}/'}}, "a[bc]{2}"),
        ({"guided_json": {"type": "boolean"}}, "true|false"),
    ],
    ids=str,
)
async def test_answers_keep_to_expressions_and_rules_in_both_endpoints(ask, fields, pattern):
    (text,) = texts_of(await ask(chat(**fields)))
    assert re.fullmatch(pattern, text)
    prompt = {"model": "bytes", "prompt": "Who?", "temperature": 1.5, "echo": True} | fields
    completion = (await ask(prompt, path="/v1/completions")).json["choices"][0]
    assert re.fullmatch(f"Who\\?({pattern})", completion["text"])
    assert completion["finish_reason"] == "stop"


async def test_a_model_that_wants_to_say_something_else_says_what_it_may(ask, scripted_head):
    answer = await ask(
        chat(response_format={"type": "json_object"}, temperature=0, max_tokens=40), head=scripted_head('{"a": "b"}')
    )
    assert texts_of(answer) == ['{"a": "b"}']
    wants_prose = scripted_head("Of course! Here it is, as you wish.")
    answer = await ask(chat(structured_outputs={"choice": ["yes", "no"]}, temperature=0), head=wants_prose)
    assert texts_of(answer)[0] in ("yes", "no")


async def test_an_answer_that_is_cut_off_says_so(ask):
    answer = await ask(chat(response_format=JSON_SCHEMA, max_tokens=9))
    assert answer.json["choices"][0]["finish_reason"] == "length"
    assert texts_of(answer)[0].startswith('{"name":')


async def test_the_end_may_be_put_off_only_as_far_as_the_form_allows(ask):
    fields = {"response_format": {"type": "regex", "regex": "a{2,6}"}, "temperature": 0}
    assert texts_of(await ask(chat(**fields, min_tokens=5)))[0] in ("aaaaa", "aaaaaa")
    assert texts_of(await ask(chat(**fields, min_tokens=50))) == ["aaaaaa"]
    assert texts_of(await ask(chat(**fields, ignore_eos=True))) == ["aaaaaa"]


async def test_a_stop_ends_an_answer_within_its_form(ask):
    answer = await ask(chat(response_format=JSON_SCHEMA, stop=["city"]))
    assert texts_of(answer)[0].endswith('"')
    assert answer.json["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param", "problem"),
    [
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format.regex", "regex parse error"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "x"}}}},
            "response_format.json_schema.schema",
            "Invalid type: x",
        ),
        ({"structured_outputs": {"grammar": "start: nope"}}, "structured_outputs.grammar", 'unknown name: "nope"'),
    ],
    ids=str,
)
async def test_what_cannot_be_compiled_is_a_400_that_names_the_field(ask, fields, param, problem, stream):
    answer = await ask(chat(**fields, stream=stream))
    error = answer.json["error"]
    assert (answer.status, error["param"], error["code"]) == (400, param, "invalid_value")
    assert error["message"].startswith(f"{param} cannot be used: ")
    assert problem in error["message"]


FORMAT = {"type": "json_schema", "schema": SCHEMA}
DIALECTS = {
    "responses": (
        "/v1/responses",
        {"input": "Who?", "text": {"format": FORMAT | {"name": "person"}}},
        lambda body: body["output"][0]["content"][0]["text"],
    ),
    "anthropic": (
        "/v1/messages",
        {"messages": MESSAGES, "max_tokens": 300, "output_config": {"format": FORMAT}},
        lambda body: body["content"][0]["text"],
    ),
    "ollama chat": (
        "/api/chat",
        {"messages": MESSAGES, "stream": False, "format": SCHEMA},
        lambda body: body["message"]["content"],
    ),
    "ollama generate": (
        "/api/generate",
        {"prompt": "Who?", "raw": True, "stream": False, "format": SCHEMA},
        lambda body: body["response"],
    ),
}


@pytest.mark.parametrize("name", DIALECTS)
async def test_the_other_apis_have_forms_too(ask, name):
    path, body, text_of = DIALECTS[name]
    answer = await ask(body | {"model": "bytes"}, path=path)
    assert json.loads(text_of(answer.json))["city"] in ("Rome", "Oslo")


async def test_their_errors_name_the_field_as_the_client_wrote_it(ask):
    answer = await ask({"model": "bytes", "messages": MESSAGES, "format": {"type": "x"}}, path="/api/chat")
    assert answer.status == 400
    assert answer.json["error"] == "format cannot be used: Invalid type: x"


class Refusal:
    """In place of the process that would be killed."""

    async def check(self, grammar):
        await trio.lowlevel.checkpoint()
        raise InvalidRequest("compiling it did not end within 2 s")


async def test_a_form_that_takes_too_long_to_compile_is_a_400(open_api):
    async with open_api(grammar_check=Refusal()) as (caller, _):
        answer = await caller.post("/v1/chat/completions", chat(response_format=JSON_SCHEMA))
    assert (answer.status, answer.json["error"]["param"]) == (400, "response_format.json_schema.schema")
    assert answer.json["error"]["message"].endswith("cannot be used: compiling it did not end within 2 s")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_form_that_becomes_too_complex_on_the_way_ends_the_answer_with_an_error(ask, stream):
    grammar = 'start: "ok" ("a"{1000}){1000}'
    answer = await ask(chat(structured_outputs={"grammar": grammar}, stream=stream))
    if stream:
        assert answer.events[-1]["error"]["code"] == "invalid"
        message = answer.events[-1]["error"]["message"]
    else:
        assert answer.status == 400
        message = answer.json["error"]["message"]
    assert message.startswith("the answer's grammar fails after")


class Person(BaseModel):
    name: str = Field(max_length=8)
    city: Literal["Rome", "Oslo"]
    friends: list[Literal["Ann", "Bob"]] = Field(max_length=2)


@pytest.mark.real_time
async def test_openai_s_client_parses_what_the_model_says_into_a_class(open_daemon, soft_head):
    def use(client):
        fields = {"model": "bytes", "messages": MESSAGES, "temperature": 1.2, "seed": 3, "max_tokens": 300}
        parsed = client.chat.completions.parse(response_format=Person, **fields)
        with client.chat.completions.stream(response_format=Person, **fields) as stream:
            streamed = stream.get_final_completion()
        return parsed.choices[0].message.parsed, streamed.choices[0].message.parsed

    async with open_daemon(soft_head) as daemon:
        parsed, streamed = await trio.to_thread.run_sync(use, openai_client(daemon))
    assert isinstance(parsed, Person)
    assert parsed == streamed
