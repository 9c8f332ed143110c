"""Thoughts come apart from the answer, in every API, whole and streamed."""

from __future__ import annotations

import pytest

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ '<think>' if opens }}{% endif %}{# </think> #}"
)
SAID = "<think>2+2 is 4.</think>\n\nIt is 4."
MESSAGES = [{"role": "user", "content": "2+2?"}]


@pytest.fixture
def ask(open_api, scripted_head):
    """`await ask(said, body)`: what the API answers if the model says that."""

    async def ask(said, path="/v1/chat/completions", **fields):
        body = {"model": "bytes", "messages": MESSAGES, "max_tokens": 60, "temperature": 0} | fields
        async with open_api(scripted_head(said), chat_template=TEMPLATE) as (caller, _):
            answer = await caller.post(path, {name: value for name, value in body.items() if value is not None})
        assert answer.status == 200, answer.body
        return answer

    return ask


@pytest.mark.parametrize(
    ("said", "opens", "limit", "thought", "text", "finish"),
    [
        (SAID, False, 60, "2+2 is 4.", "It is 4.", "stop"),
        (SAID.removeprefix("<think>"), True, 60, "2+2 is 4.", "It is 4.", "stop"),
        (SAID, False, 14, "2+2 is", "", "length"),
        ("It is 4.", False, 60, None, "It is 4.", "stop"),
    ],
)
async def test_chats_have_reasoning_content(ask, said, opens, limit, thought, text, finish):
    fields = {"chat_template_kwargs": {"opens": opens}, "max_tokens": limit}
    choice = (await ask(said, **fields)).json["choices"][0]
    assert (choice["message"].get("reasoning_content"), choice["message"]["content"]) == (thought, text)
    assert choice["finish_reason"] == finish
    *events, done = (await ask(said, stream=True, **fields)).events
    deltas = [event["choices"][0]["delta"] for event in events]
    assert done == "[DONE]"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == (thought or "")
    assert "".join(delta.get("content", "") for delta in deltas) == text
    assert events[-1]["choices"][0]["finish_reason"] == finish


async def test_a_message_that_is_continued_may_be_in_a_thought(ask):
    messages = [*MESSAGES, {"role": "assistant", "content": "<think>2+2"}]
    answer = await ask(" is 4.</think>It is 4.", messages=messages, continue_final_message=True)
    message = answer.json["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("is 4.", "It is 4.")
    messages[-1]["content"] = "<think>2+2</think>It"
    answer = await ask(" is 4.", messages=messages, continue_final_message=True)
    message = answer.json["choices"][0]["message"]
    assert (message.get("reasoning_content"), message["content"]) == (None, " is 4.")


async def test_a_user_who_writes_a_mark_opens_no_thought(ask):
    messages = [{"role": "user", "content": "What is <think>"}]
    assert (await ask("A mark.", messages=messages)).json["choices"][0]["message"]["content"] == "A mark."


async def test_the_other_apis_have_thoughts_of_their_own(ask):
    blocks = (await ask(SAID, path="/v1/messages")).json["content"]
    assert [block["type"] for block in blocks] == ["thinking", "text"]
    assert (blocks[0]["thinking"], blocks[1]["text"]) == ("2+2 is 4.", "It is 4.")
    fields = {"messages": None, "max_tokens": None, "input": "2+2?", "max_output_tokens": 60}
    output = (await ask(SAID, path="/v1/responses", **fields)).json["output"]
    assert [item["type"] for item in output] == ["reasoning", "message"]
    fields = {"max_tokens": None, "temperature": None, "stream": False}
    message = (await ask(SAID, path="/api/chat", **fields)).json["message"]
    assert (message["thinking"], message["content"]) == ("2+2 is 4.", "It is 4.")
