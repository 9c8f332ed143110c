"""Where a model's thoughts go in each API that has a place for them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from peerd.api.anthropic.writer import MessageWriter
from peerd.api.chats import Part
from peerd.api.ollama.writer import LineWriter, as_message
from peerd.api.openai.answers import Usage
from peerd.api.responses.writer import ResponseWriter

CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
PARTS = (
    Part("", "Let me ", (), None, None),
    Part("", "see.", (), None, None),
    Part("I ", "", (), None, None),
    Part("look.", "", (CALL,), "tool_calls", None),
)


class ThoughtfulChat:
    """A chat whose answer is `PARTS`, of which each token is the number."""

    def __init__(self) -> None:
        self.answers = SimpleNamespace(usage=Usage(5, 4), first_token_at=None)

    def part(self, picked: Any) -> Part:
        return PARTS[picked]


def streamed(writer: Any) -> bytes:
    pieces = [writer.piece(number) for number in range(len(PARTS))]
    return b"".join([writer.opening(), *pieces, writer.closing()])


def events_of(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(block.split("data: ", 1)[1]) for block in body.decode().split("\n\n")[:-1]]


def message_writer() -> MessageWriter:
    chat: Any = ThoughtfulChat()
    return MessageWriter(chat, "m")


def response_writer(kept: list[Any]) -> ResponseWriter:
    chat: Any = ThoughtfulChat()
    shown = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    wanted: Any = SimpleNamespace(shown=shown, is_kept=True, chat=SimpleNamespace(common=SimpleNamespace(model="m")))
    return ResponseWriter(chat, wanted, lambda body, message: kept.append(message))


def test_thoughts_are_a_block_before_the_text_in_anthropic_s_messages() -> None:
    message = message_writer().whole([list(range(len(PARTS)))])
    thinking, text, call = message["content"]
    assert thinking == {"type": "thinking", "thinking": "Let me see.", "signature": ""}
    assert text == {"type": "text", "text": "I look."}
    assert (call["name"], call["input"], message["stop_reason"]) == ("weather", {"city": "Rome"}, "tool_use")


def test_each_block_of_a_stream_is_ended_before_the_next_begins() -> None:
    kinds = [event["type"] for event in events_of(streamed(message_writer()))]
    block = ["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"]
    call = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds == ["message_start", "ping", *block, *block, *call, "message_delta", "message_stop"]


def test_thoughts_are_an_item_of_their_own_in_responses_and_are_kept_for_the_template() -> None:
    kept: list[Any] = []
    body = Response.model_validate(response_writer(kept).whole([list(range(len(PARTS)))]))
    reasoning, message, call = body.output
    assert (reasoning.content[0].text, message.content[0].text) == ("Let me see.", "I look.")
    assert call.name == "weather"
    assert body.usage.output_tokens_details.reasoning_tokens == 2
    expected = {"role": "assistant", "content": "I look.", "reasoning_content": "Let me see.", "tool_calls": [CALL]}
    assert kept == [expected]


def test_thoughts_are_streamed_as_events_that_openai_s_types_know() -> None:
    events = [
        TypeAdapter(ResponseStreamEvent).validate_python(each) for each in events_of(streamed(response_writer([])))
    ]
    deltas = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert deltas == "Let me see."
    added = [event.item.type for event in events if event.type == "response.output_item.added"]
    assert added == ["reasoning", "message", "function_call"]


async def test_thoughts_are_a_field_beside_the_text_in_ollama_s_lines() -> None:
    chat: Any = ThoughtfulChat()
    lines = [json.loads(line) for line in streamed(LineWriter(chat, "m", as_message)).splitlines()]
    messages = [line["message"] for line in lines]
    assert "".join(message.get("thinking", "") for message in messages) == "Let me see."
    assert "".join(message["content"] for message in messages) == "I look."
    assert messages[3]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    [whole] = [LineWriter(chat, "m", as_message).whole([list(range(len(PARTS)))])]
    assert (whole["message"]["thinking"], whole["done_reason"]) == ("Let me see.", "stop")
