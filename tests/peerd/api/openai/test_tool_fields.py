"""The fields of tool calls: tools, choices, and the messages that carry calls and what tools answered."""

from __future__ import annotations

import json

import pytest

from peerd.api.errors import ApiError
from peerd.api.fields import Fields
from peerd.api.openai.requests import read_chat

USER = {"role": "user", "content": "Hi"}
FUNCTION = {"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
ASSISTANT = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWER = {"role": "tool", "tool_call_id": "call_1", "content": "It rains."}


def chat(messages=(USER,), **fields):
    return read_chat(Fields({"model": "m", "messages": list(messages)} | fields))


def function(**fields):
    return {"tools": [{"type": "function", "function": FUNCTION | fields}]}


def named(name):
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}, "tool_choice": "any"}, "tool_choice"),
        ({"tools": "weather"}, "tools"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": ["weather"]}, "tools[0]"),
        ({"tools": [TOOL, {"type": "custom", "custom": {}}]}, "tools[1].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [TOOL | {"cache": True}]}, "tools[0].cache"),
        (function(name=None), "tools[0].function.name"),
        (function(name="two words"), "tools[0].function.name"),
        (function(name="x" * 65), "tools[0].function.name"),
        (function(description=3), "tools[0].function.description"),
        (function(parameters=[]), "tools[0].function.parameters"),
        (function(strict="yes"), "tools[0].function.strict"),
        (function(arguments={}), "tools[0].function.arguments"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function.name"),
        ({"tools": [TOOL], "tool_choice": named("now")}, "tool_choice.function.name"),
        ({"tools": [TOOL], "tool_choice": named("weather") | {"more": 1}}, "tool_choice.more"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": named("weather")}, "tool_choice"),
        ({"tools": [TOOL], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"functions": [FUNCTION]}, "functions"),
        ({"function_call": {"name": "weather"}}, "function_call"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_wrong_with_tools_is_named(fields, param):
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param in str(caught.value)


def calls(*wrong):
    return [USER, ASSISTANT | {"tool_calls": list(wrong)}]


def with_function(**fields):
    return calls(CALL | {"function": CALL["function"] | fields})


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([USER | {"tool_calls": [CALL]}], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": None}], "messages[0].content"),
        ([{"role": "assistant", "content": "", "function_call": {"name": "f"}}], "messages[0].function_call"),
        ([USER, ASSISTANT | {"tool_calls": {}}], "messages[1].tool_calls"),
        ([USER, ASSISTANT | {"tool_calls": [CALL] * 129}], "messages[1].tool_calls"),
        (calls("weather"), "messages[1].tool_calls[0]"),
        (calls(CALL, CALL | {"id": ""}), "messages[1].tool_calls[1].id"),
        (calls(CALL | {"type": "custom"}), "messages[1].tool_calls[0].function"),
        (calls(CALL | {"function": None}), "messages[1].tool_calls[0].function"),
        (with_function(name=""), "messages[1].tool_calls[0].function.name"),
        (with_function(arguments={}), "messages[1].tool_calls[0].function.arguments"),
        (with_function(arguments="[1]"), "messages[1].tool_calls[0].function.arguments"),
        (with_function(arguments='{"city'), "messages[1].tool_calls[0].function.arguments"),
        (with_function(arguments="[" * 100_000), "messages[1].tool_calls[0].function.arguments"),
        (with_function(arguments='{"city": "\\ud83d"}'), "messages[1].tool_calls[0].function.arguments"),
        (with_function(arguments='{"\\ud83d": 1}'), "messages[1].tool_calls[0].function.arguments"),
        (with_function(arguments='{"city": NaN}'), "messages[1].tool_calls[0].function.arguments"),
        (with_function(arguments='{"city": 1e999}'), "messages[1].tool_calls[0].function.arguments"),
        ([USER, ASSISTANT, {"role": "tool", "content": ""}], "messages[2].tool_call_id"),
        ([USER, ASSISTANT, ANSWER | {"tool_call_id": "call_2"}], "messages[2].tool_call_id"),
        ([ANSWER, USER, ASSISTANT], "messages[0].tool_call_id"),
        ([USER, ASSISTANT, ANSWER | {"content": None}], "messages[2].content"),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_what_is_wrong_with_a_message_is_named(messages, param):
    with pytest.raises(ApiError) as caught:
        chat(messages)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_tools_are_read_as_templates_take_them():
    asked = chat(tools=[TOOL, {"type": "function", "function": {"name": "now", "strict": True}}]).tools
    assert asked is not None
    empty = {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}}
    assert asked.tools == [TOOL, {"type": "function", "function": empty}]
    assert set(asked.schemas) == {"weather", "now"}
    assert asked.parallel


@pytest.mark.parametrize(("value", "parallel"), [(None, True), (True, True), (False, False)])
def test_several_calls_are_allowed_unless_the_client_says_otherwise(value, parallel):
    asked = chat(tools=[TOOL], tool_choice="auto", parallel_tool_calls=value).tools
    assert asked is not None
    assert asked.parallel == parallel


def test_a_call_may_be_required_and_of_a_certain_tool():
    now = {"type": "function", "function": {"name": "now"}}
    both = [TOOL, now]
    assert chat(tools=both).tools.must_call == ()
    assert chat(tools=both, tool_choice="required").tools.must_call == ("weather", "now")
    assert chat(tools=both, tool_choice="required").tools.parallel
    certain = chat(tools=both, tool_choice=named("now")).tools
    assert (certain.must_call, certain.parallel, len(certain.tools)) == (("now",), False, 2)


@pytest.mark.parametrize("fields", [{"tools": []}, {"tools": [TOOL], "tool_choice": "none"}, {"tool_choice": "auto"}])
def test_no_tools_are_offered_where_none_may_be_called(fields):
    assert chat(**fields).tools is None


def test_a_tool_s_answer_has_the_name_of_what_was_called():
    messages = chat([USER, ASSISTANT, ANSWER]).messages
    read = CALL["function"] | {"values": json.loads(CALL["function"]["arguments"])}
    assert messages[1] == ASSISTANT | {"tool_calls": [CALL | {"function": read}]}
    assert messages[2] == ANSWER | {"name": "weather"}


def test_a_call_without_arguments_may_have_an_empty_text():
    (_, message) = chat(with_function(arguments="")).messages
    assert message["tool_calls"][0]["function"]["arguments"] == "{}"
