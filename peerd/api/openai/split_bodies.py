"""The JSON of chat answers that are split into thoughts, text and tool calls."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peerd.api.openai.bodies import BytesOf, ChatShape
from peerd.api.openai.tool_calls.call import Call, Reader, Thought
from peerd.client.picked import Picked


class SplitChatShape(ChatShape):
    """The answers of /v1/chat/completions where the model may think or call tools."""

    def __init__(
        self, model: str, bytes_of: BytesOf, make_reader: Callable[[], Reader], count: int, *, parallel: bool
    ) -> None:
        """count: of answers; parallel: whether an answer may have more than one call."""
        super().__init__(model, bytes_of)
        self._answers = [_Answer(make_reader(), parallel) for _ in range(count)]

    def piece(self, picked: Picked) -> dict[str, Any]:
        """The piece for one token. A call comes in one piece, as soon as all of it is there."""
        piece = super().piece(picked)
        answer = self._answers[picked.row]
        part = answer.add(picked)
        is_empty = not (part.text or part.thought or part.calls)
        delta: dict[str, Any] = {"content": part.text} if part.text or (is_empty and picked.finish is None) else {}
        if part.thought:
            delta["reasoning_content"] = part.thought
        if part.calls:
            first = answer.count - len(part.calls)
            delta["tool_calls"] = [{"index": first + number} | call for number, call in enumerate(part.calls)]
        piece["choices"][0] |= {"delta": delta, "finish_reason": answer.finish(picked)}
        return piece

    def whole(self, answers: Sequence[Sequence[Picked]], usage: dict[str, int]) -> dict[str, Any]:
        """All answers in one body."""
        body = super().whole(answers, usage)
        for choice, answer, picks in zip(body["choices"], self._answers, answers, strict=True):
            parts = [answer.add(picked) for picked in picks]
            text = "".join(part.text for part in parts)
            calls = [call for part in parts for call in part.calls]
            choice["message"]["content"] = text if text or not calls else None
            if thought := "".join(part.thought for part in parts):
                choice["message"]["reasoning_content"] = thought
            if calls:
                choice["message"]["tool_calls"] = calls
            choice["finish_reason"] = answer.finish(picks[-1])
        return body


@dataclass(frozen=True, slots=True)
class _Part:
    """What one token completes."""

    thought: str
    text: str
    calls: list[dict[str, Any]]


class _Answer:
    """One answer while it comes. `count`: of its calls so far."""

    def __init__(self, reader: Reader, parallel: bool) -> None:
        self.count = 0
        self._reader = reader
        self._parallel = parallel

    def add(self, picked: Picked) -> _Part:
        """What this token completes."""
        pieces = self._reader.add(picked.text, final=picked.finish is not None)
        calls = [piece for piece in pieces if isinstance(piece, Call)]
        if not self._parallel:
            calls = calls[: 1 - self.count]
        self.count += len(calls)
        return _Part(
            "".join(piece.text for piece in pieces if isinstance(piece, Thought)),
            "".join(piece for piece in pieces if isinstance(piece, str)),
            [_call_json(call) for call in calls],
        )

    def finish(self, picked: Picked) -> str | None:
        """Why the answer ended with this token, if it did."""
        return "tool_calls" if self.count and picked.finish == "stop" else picked.finish


def _call_json(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
