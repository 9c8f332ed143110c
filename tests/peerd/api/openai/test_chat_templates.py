"""Chat templates run in a process that can be killed. These tests use real processes and real time."""

from __future__ import annotations

import pytest
import trio

from peerd.api.openai.chat_templates import RENDER_LIMIT_S, TemplateProcess, open_chat_templates
from peerd.protocol.errors import InvalidRequest

pytestmark = pytest.mark.real_time

MESSAGES = [{"role": "user", "content": "Hi"}]
PLAIN = "{{ bos }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '>' if add_generation_prompt }}"


async def test_a_template_sees_messages_and_the_model_s_tokens():
    async with open_chat_templates() as templates:
        assert await templates.render(PLAIN, MESSAGES, {"bos": "^"}) == "^<user>Hi>"


async def test_a_template_that_never_ends_is_ended_and_the_next_one_runs():
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    async with open_chat_templates() as templates:
        assert await templates.render(PLAIN, MESSAGES, {"bos": ""})
        started = trio.current_time()
        with pytest.raises(InvalidRequest, match="did not end within 1 s"):
            await templates.render(endless, MESSAGES, {})
        assert trio.current_time() - started < RENDER_LIMIT_S + 5
        assert await templates.render(PLAIN, MESSAGES, {"bos": "^"}) == "^<user>Hi>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no system messages') }}", "no system messages"),
        ("{% if", "TemplateSyntaxError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ 'x' * 9000000000 }}", "memory"),
    ],
    ids=["refuses", "broken", "breaks out", "hogs memory"],
)
async def test_what_a_template_does_wrong_is_the_caller_s_to_know(template, said):
    async with open_chat_templates() as templates:
        with pytest.raises(InvalidRequest, match=said):
            await templates.render(template, MESSAGES, {})
        assert await templates.render(PLAIN, MESSAGES, {"bos": ""}) == "<user>Hi>"


async def test_cancelling_a_rendering_leaves_no_half_answer_for_the_next():
    slow = "{% for i in range(900) %}{% for j in range(900) %}{% endfor %}{% endfor %}slow"
    async with open_chat_templates() as templates:
        assert await templates.render(PLAIN, MESSAGES, {"bos": ""})
        with trio.move_on_after(0.01) as scope:
            await templates.render(slow, MESSAGES, {})
        assert scope.cancelled_caught
        assert await templates.render(PLAIN, MESSAGES, {"bos": "^"}) == "^<user>Hi>"


async def test_a_line_that_cannot_be_read_does_not_end_the_process():
    process = TemplateProcess()
    try:
        answer = await process.render(b"[" * 100_000 + b"\n")
    finally:
        await process.close()
    assert "RecursionError" in answer["error"]
