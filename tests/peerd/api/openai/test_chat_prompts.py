"""Chats in chat templates that use tools, each in the way of its form."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest

from peerd.api.errors import ApiError
from peerd.api.fields import Fields
from peerd.api.openai.chat_prompts import chat_prompt
from peerd.api.openai.requests import read_chat
from tests.peerd.api.conftest import InProcessTemplates

TOOL = {"type": "function", "function": {"name": "weather"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
MESSAGES = [
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
]
HERMES = (
    "{% if tools %}[{{ tools[0].function.name }}]{% endif %}{% for m in messages %}<{{ m.role }}"
    "{{ ' ' + m.name if m.role == 'tool' }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function.arguments.city }}</tool_call>{% endfor %}{% endfor %}"
)
DEEPSEEK = (
    "{{ tools }}{% for m in messages %}{% if m.content is none %}"
    "<\uff5ctool\u2581calls\u2581begin\uff5c>{{ m.tool_calls[0].function.arguments + '!' }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ tools }}{% for m in messages %}{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.id }}{% endfor %}"
    "{% if m.tool_call_id %}={{ m.tool_call_id }}{% endif %}{% endfor %}"
)
XML_TOOLS = (
    "{% for tool in xml_tools or [] %}[{{ tool.name }}]<tool_call>{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
UNKNOWN = "{{ tools }}{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}"
WITHOUT = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def render(byte_tokenizer):
    async def render(template, messages=MESSAGES, **fields):
        tokenizer = copy.copy(byte_tokenizer)
        tokenizer.chat_template = template
        wanted = read_chat(Fields({"model": "m", "messages": messages} | fields))
        return await chat_prompt(SimpleNamespace(tokenizer=tokenizer), wanted, InProcessTemplates())

    return render


async def test_whether_a_template_uses_tools_is_asked_once(byte_tokenizer):
    tokenizer, templates = copy.copy(byte_tokenizer), InProcessTemplates()
    tokenizer.chat_template = HERMES
    wanted = read_chat(Fields({"model": "m", "messages": MESSAGES, "tools": [TOOL]}))
    for rendered in (3, 4, 5):
        await chat_prompt(SimpleNamespace(tokenizer=tokenizer), wanted, templates)
        assert templates.rendered == rendered


async def test_tools_calls_and_their_answers_go_through_the_template(render):
    prompt = await render(HERMES, tools=[TOOL])
    assert prompt.text == "[weather]<user>Rome?<assistant><tool_call>Rome</tool_call><tool weather>Rain."
    assert prompt.reading.marks == ("<tool_call>", "</tool_call>")


async def test_without_tools_past_calls_are_still_shown(render):
    prompt = await render(HERMES, tools=[TOOL], tool_choice="none")
    assert prompt.text == "<user>Rome?<assistant><tool_call>Rome</tool_call><tool weather>Rain."
    assert prompt.reading is None


async def test_past_thoughts_are_the_template_s_to_show(render):
    template = "{% for m in messages %}{{ m.role }}:{{ m.reasoning_content }}{{ m.thinking }};{% endfor %}"
    thought = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    user = {"role": "user", "content": "?", "reasoning_content": "not for users"}
    assert (await render(template, messages=[user, thought, user])).text == "user:;assistant:2+22+2;user:;"
    older = {"role": "assistant", "content": "4", "reasoning": "2+2"}
    assert (await render(template, messages=[user, older, user])).text == "user:;assistant:2+22+2;user:;"


async def test_smollm3_s_template_takes_xml_tools_and_past_calls_as_text(render):
    said = [MESSAGES[0], MESSAGES[1] | {"content": "I look."}, MESSAGES[2]]
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    begin, end = "[weather]<tool_call><user>Rome?<assistant>", "<tool>Rain."
    assert (await render(XML_TOOLS, tools=[TOOL])).text == begin + call + end
    assert (await render(XML_TOOLS, said, tools=[TOOL])).text == f"{begin}I look.\n{call}{end}"


async def test_deepseek_s_templates_take_arguments_as_text_and_no_content(render):
    assert '{"city": "Rome"}!' in (await render(DEEPSEEK, tools=[TOOL])).text


async def test_mistral_s_templates_take_ids_of_nine_letters_and_digits(render):
    prompt = await render(MISTRAL, tools=[TOOL])
    called, answered = prompt.text.split("[TOOL_CALLS]")[1].split("=")
    assert called == answered
    assert len(called) == 9
    assert called.isalnum()


@pytest.mark.parametrize(
    ("template", "fields", "said"),
    [
        (WITHOUT, {"tools": [TOOL], "messages": MESSAGES[:1]}, "m's chat template does not use tools"),
        (UNKNOWN, {"tools": [TOOL]}, "m writes calls in a form that is not known"),
        (WITHOUT, {}, "m's chat template does not use tool_calls"),
    ],
    ids=["no tools", "unknown form", "no calls"],
)
async def test_what_a_template_cannot_do_is_refused_with_the_model_s_name(render, template, fields, said):
    with pytest.raises(ApiError, match=said) as caught:
        await render(template, **fields)
    assert (caught.value.status, caught.value.code) == (400, "unsupported_parameter")


async def test_a_model_s_own_template_for_tools_is_taken(render):
    prompt = await render({"default": WITHOUT, "tool_use": HERMES}, tools=[TOOL])
    assert prompt.text.startswith("[weather]")
