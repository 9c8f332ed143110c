"""Writes answers as Ollama's lines of JSON: a line for each piece, and the last one with counts and durations."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import trio

from peerd.api.chats import Chat, Part
from peerd.api.error_shapes import ollama_error
from peerd.api.errors import ApiError
from peerd.client.picked import Picked

Shown = Callable[[str, str, list[dict[str, Any]]], dict[str, Any]]
"""The fields of a line with this text, these thoughts and these calls."""

_NS = 1_000_000_000


def as_message(text: str, thinking: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """What a line of /api/chat has."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = calls
    return {"message": message}


def as_response(text: str, thinking: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """What a line of /api/generate has. There are no tools, and so no calls."""
    return {"response": text} | ({"thinking": thinking} if thinking else {})


def line(model: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A line with what all lines have."""
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    return {"model": model, "created_at": now} | fields


class LineWriter:
    """Writes the only answer of a chat."""

    content_type = "application/x-ndjson"

    def __init__(self, chat: Chat, model: str, shown: Shown) -> None:
        # Ollama's lines do not show it.
        self.answer_id = f"req-{uuid.uuid4().hex}"
        self._chat = chat
        self._model = model
        self._shown = shown
        self._began = trio.current_time()
        self._finish: str | None = None
        self._calls = 0

    def opening(self) -> bytes:
        """Nothing: a stream begins with its first piece."""
        return b""

    def piece(self, picked: Picked) -> bytes:
        """The line for one token; nothing if it adds nothing yet."""
        part = self._chat.part(picked)
        self._finish = part.finish or self._finish
        if not (part.text or part.reasoning or part.calls):
            return b""
        return _written(self._line(part.text, part.reasoning, self._called([part])) | {"done": False})

    def closing(self) -> bytes:
        """The last line."""
        return _written(self._line("", "", []) | self._end())

    def failure(self, error: ApiError) -> bytes:
        """The error as the last line."""
        return _written(ollama_error(error))

    def whole(self, answers: Sequence[Sequence[Picked]]) -> dict[str, Any]:
        """The answer as one line."""
        parts = [self._chat.part(picked) for picked in answers[0]]
        self._finish = parts[-1].finish
        text, thinking = "".join(part.text for part in parts), "".join(part.reasoning for part in parts)
        return self._line(text, thinking, self._called(parts)) | self._end()

    def _line(self, text: str, thinking: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        return line(self._model, self._shown(text, thinking, calls))

    def _called(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        calls = [_call(call) for part in parts for call in part.calls]
        for call in calls:
            call["function"]["index"] = self._calls
            self._calls += 1
        return calls

    def _end(self) -> dict[str, Any]:
        answers, now = self._chat.answers, trio.current_time()
        first = now if answers.first_token_at is None else answers.first_token_at
        return {
            "done": True,
            "done_reason": "length" if self._finish == "length" else "stop",
            "total_duration": int((now - self._began) * _NS),
            "load_duration": 0,
            "prompt_eval_count": answers.usage.prompt_tokens,
            "prompt_eval_duration": int((first - self._began) * _NS),
            "eval_count": answers.usage.completion_tokens,
            "eval_duration": int((now - first) * _NS),
        }


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {"id": call["id"], "function": {"name": function["name"], "arguments": json.loads(function["arguments"])}}


def _written(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"
