"""Writes answers as Anthropic's messages: blocks of thoughts, text and calls, whole or as events."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from peerd.api.chats import Chat, Part
from peerd.api.error_shapes import anthropic_error
from peerd.api.errors import ApiError
from peerd.api.openai.event_writer import EVENT_STREAM, event
from peerd.client.picked import Picked


class MessageWriter:
    """Writes the only answer of a chat."""

    content_type = EVENT_STREAM

    def __init__(self, chat: Chat, model: str) -> None:
        self._chat = chat
        self._model = model
        self.answer_id = f"msg_{uuid.uuid4().hex}"
        # The blocks so far, of which the last one is open in a stream unless it is a call.
        self._blocks: list[dict[str, Any]] = []
        self._is_open = False
        self._reason: str | None = None
        self._stop: str | None = None

    def opening(self) -> bytes:
        """The message without its content, and a ping, as in Anthropic's API."""
        return _event({"type": "message_start", "message": self._message()}) + _event({"type": "ping"})

    def piece(self, picked: Picked) -> bytes:
        """The events for one token."""
        return b"".join(map(_event, self._events(self._chat.part(picked))))

    def closing(self) -> bytes:
        """The end of the last block and of the message."""
        delta = {"stop_reason": self._reason, "stop_sequence": self._stop}
        ends = [
            *self._end_of_block(),
            {"type": "message_delta", "delta": delta, "usage": self._usage()},
            {"type": "message_stop"},
        ]
        return b"".join(map(_event, ends))

    def failure(self, error: ApiError) -> bytes:
        """The error as the last event."""
        return _event(anthropic_error(error))

    def whole(self, answers: Sequence[Sequence[Picked]]) -> dict[str, Any]:
        """The message in one body."""
        for picked in answers[0]:
            self._events(self._chat.part(picked))
        return self._message()

    def _message(self) -> dict[str, Any]:
        return {
            "id": self.answer_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": self._blocks,
            "stop_reason": self._reason,
            "stop_sequence": self._stop,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, int]:
        usage = self._chat.answers.usage
        # Anthropic counts what was cached apart from the rest of the prompt.
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_read_input_tokens": usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.completion_tokens,
        }

    def _events(self, part: Part) -> list[dict[str, Any]]:
        """Take in a part of the answer. Returns what a stream says of it."""
        events: list[dict[str, Any]] = []
        if part.reasoning:
            events += self._grown("thinking", part.reasoning, {"signature": ""})
        if part.text:
            events += self._grown("text", part.text, {})
        for call in part.calls:
            events += self._end_of_block() + self._called(call["function"])
        if part.finish is not None:
            self._reason, self._stop = _reason(part), part.stop
        return events

    def _grown(self, kind: str, text: str, others: dict[str, Any]) -> list[dict[str, Any]]:
        """Add to the open block if it is of this kind (its field of that name has the text), else to a new one."""
        events: list[dict[str, Any]] = []
        if not self._is_open or self._blocks[-1]["type"] != kind:
            empty = {"type": kind, kind: ""} | others
            events = [*self._end_of_block(), self._begun(empty)]
            self._blocks.append(dict(empty))
            self._is_open = True
        self._blocks[-1][kind] += text
        return [*events, self._delta({"type": f"{kind}_delta", kind: text})]

    def _called(self, function: dict[str, Any]) -> list[dict[str, Any]]:
        block = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": function["name"]}
        begun = self._begun(block | {"input": {}})
        self._blocks.append(block | {"input": json.loads(function["arguments"])})
        delta = self._delta({"type": "input_json_delta", "partial_json": function["arguments"]})
        return [begun, delta, self._ended()]

    def _end_of_block(self) -> list[dict[str, Any]]:
        """The event that ends the open block, if there is one."""
        was_open, self._is_open = self._is_open, False
        return [self._ended()] if was_open else []

    def _begun(self, block: dict[str, Any]) -> dict[str, Any]:
        """The event of a block that is to be added to the others."""
        return {"type": "content_block_start", "index": len(self._blocks), "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _ended(self) -> dict[str, Any]:
        return {"type": "content_block_stop", "index": len(self._blocks) - 1}


def _reason(part: Part) -> str:
    if part.finish == "stop":
        return "end_turn" if part.stop is None else "stop_sequence"
    return "tool_use" if part.finish == "tool_calls" else "max_tokens"


def _event(value: dict[str, Any]) -> bytes:
    return event(value, value["type"])
