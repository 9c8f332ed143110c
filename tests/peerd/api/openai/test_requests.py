"""The fields of requests: OpenAI's fields, their limits, and those that are refused by name."""

from __future__ import annotations

import pytest

from peerd.api.errors import ApiError
from peerd.api.fields import Fields
from peerd.api.openai.grammar_fields import AskedGrammar
from peerd.api.openai.requests import read_chat, read_completion
from peerd.client.grammars.grammar import Grammar

MESSAGES = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}


def chat(**fields):
    return read_chat(Fields({"model": "m", "messages": MESSAGES} | fields))


def completion(**fields):
    return read_completion(Fields({"model": "m", "prompt": "Hi"} | fields))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
        ({"messages": [*MESSAGES, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"verbosity": "low"}, "verbosity"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 10**4000}, "max_tokens"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": []}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "regex", "regex": ""}}, "response_format.regex"),
        ({"response_format": {"type": "grammar", "grammar": "x" * 140_000}}, "response_format.grammar"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"temprature": 1}, "temprature"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_in_a_chat_is_named(fields, param):
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert param in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a"] * 200, "n": 2}, "n"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"prompt": [10**4000]}, "prompt"),
        ({"add_special_tokens": False}, "add_special_tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_in_a_completion_is_named(fields, param):
    with pytest.raises(ApiError) as caught:
        completion(**fields)
    assert caught.value.param == param


def test_fields_that_change_nothing_are_ignored_and_null_is_left_out():
    asked = chat(
        user="u", store=True, metadata={}, tools=None, temperature=None, response_format={"type": "text"}
    ).common
    assert asked.sampling["temperature"] is None


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "none"},
        {"verbosity": "medium"},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"tool_choice": "none"},
        {"functions": [{"name": "f"}], "function_call": "none"},
        {"prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "implicit"}, "prompt_cache_key": "k"},
        {"prediction": {"type": "content", "content": "x"}},
        {"skip_special_tokens": True, "length_penalty": 1.0, "use_beam_search": False, "priority": 3},
        {"add_generation_prompt": True, "continue_final_message": False},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_asks_for_what_happens_anyway_is_accepted(fields):
    assert chat(**fields).common.max_tokens is None


def test_fields_of_vllm_s_are_read():
    asked = chat(ignore_eos=True, stop_token_ids=[5, 7], min_tokens=3)
    assert (asked.common.ignore_eos, asked.common.stop_token_ids) == (True, (5, 7))
    assert asked.common.sampling["min_new_tokens"] == 3
    assert asked.template.opens_answer
    continued = chat(continue_final_message=True).template
    assert (continued.opens_answer, continued.continues_last) == (False, True)


def test_no_reasoning_is_told_to_the_template_unless_the_client_says_otherwise():
    assert chat(reasoning_effort="none").template.variables == {"enable_thinking": False}
    both = chat(reasoning_effort="none", chat_template_kwargs={"enable_thinking": True, "x": 1})
    assert both.template.variables == {"enable_thinking": True, "x": 1}


@pytest.mark.parametrize(
    ("fields", "grammar", "param"),
    [
        ({"response_format": {"type": "json_object"}}, Grammar.json_object(), "response_format.type"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            Grammar.json_schema(SCHEMA),
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            Grammar.json_schema(SCHEMA, strict=False),
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "regex", "regex": "a+"}}, Grammar.regex("a+"), "response_format.regex"),
        ({"response_format": {"type": "grammar", "grammar": "r"}}, Grammar.ebnf("r"), "response_format.grammar"),
        (
            {"structured_outputs": {"json": SCHEMA}},
            Grammar.json_schema(SCHEMA, strict=False),
            "structured_outputs.json",
        ),
        ({"structured_outputs": {"json_object": True}}, Grammar.json_object(), "structured_outputs.json_object"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Grammar.choice(["a", "b"]), "structured_outputs.choice"),
        ({"guided_grammar": "r"}, Grammar.ebnf("r"), "guided_grammar"),
        ({"guided_json": SCHEMA}, Grammar.json_schema(SCHEMA, strict=False), "guided_json"),
    ],
    ids=lambda value: str(value)[:60],
)
@pytest.mark.parametrize("read", [chat, completion])
def test_the_form_of_an_answer_is_read_from_openai_s_field_and_from_vllm_s(read, fields, grammar, param):
    assert read(**fields).common.grammar == AskedGrammar(grammar, param)


def test_without_a_form_an_answer_is_any_text():
    assert chat().common.grammar is None
    assert chat(response_format={"type": "text"}, structured_outputs={}).common.grammar is None


def test_the_newer_name_of_the_limit_wins():
    assert chat(max_tokens=5, max_completion_tokens=7).common.max_tokens == 7
    assert chat(max_tokens=5).common.max_tokens == 5
    assert completion().common.max_tokens == 16


def test_text_parts_and_developer_messages_are_plain_text_to_the_template():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = chat(
        messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    ).messages
    assert messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ab"}]


@pytest.mark.parametrize("prompt", ["a", [1, 2], ["a", "b"], [[1], [2, 3]]], ids=str)
def test_prompts_come_in_four_forms(prompt):
    prompts = completion(prompt=prompt).prompts
    assert prompts == (prompt if isinstance(prompt[0], str | list) and not isinstance(prompt, str) else [prompt])
