"""Writes answers as responses: items of reasoning, text and calls, whole or as events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from peerd.api.chats import Chat, Part
from peerd.api.errors import ApiError
from peerd.api.openai.event_writer import EVENT_STREAM, event
from peerd.api.responses.requests import ResponsesRequest
from peerd.client.picked import Picked

Keep = Callable[[dict[str, Any], dict[str, Any]], None]
"""Takes the finished response, and its answer as a message of chats."""
Events = list[dict[str, Any]]

# The parts of which items with text consist, and what their events are called.
_PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "message": ("output_text", {"annotations": [], "logprobs": []}),
    "reasoning": ("reasoning_text", {}),
}
# Text comes with its logprobs, of which there are none.
_WITH_LOGPROBS: dict[str, dict[str, Any]] = {"output_text": {"logprobs": []}, "reasoning_text": {}}


class ResponseWriter:
    """Writes the only answer of a chat. `keep` is called once if it is finished."""

    content_type = EVENT_STREAM

    def __init__(self, chat: Chat, wanted: ResponsesRequest, keep: Keep) -> None:
        self._chat = chat
        self._wanted = wanted
        self._keep = keep
        self.answer_id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._sequence = 0
        self._reasoning_tokens = 0
        self._finish: str | None = None
        # The items so far; the last one may still grow.
        self._items: list[dict[str, Any]] = []
        self._is_open = False
        self._calls: list[dict[str, Any]] = []

    def opening(self) -> bytes:
        """The response without output, twice, as in OpenAI's API."""
        body = self._body("in_progress")
        return self._written([{"type": f"response.{name}", "response": body} for name in ("created", "in_progress")])

    def piece(self, picked: Picked) -> bytes:
        """The events for one token."""
        return self._written(self._events(self._chat.part(picked)))

    def closing(self) -> bytes:
        """The end of the last item, and the response with everything in it."""
        ends = self._end_of_item()
        body = self._finished()
        return self._written([*ends, {"type": f"response.{body['status']}", "response": body}])

    def failure(self, error: ApiError) -> bytes:
        """The response as the last event, with its error."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        body = self._body("failed") | {"error": {"code": code, "message": str(error)}}
        return self._written([{"type": "response.failed", "response": body}])

    def whole(self, answers: Sequence[Sequence[Picked]]) -> dict[str, Any]:
        """The response in one body."""
        for picked in answers[0]:
            self._events(self._chat.part(picked))
        self._end_of_item()
        return self._finished()

    def _finished(self) -> dict[str, Any]:
        body = self._body("incomplete" if self._finish == "length" else "completed")
        if self._wanted.is_kept:
            self._keep(body, self._as_message())
        return body

    def _as_message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._said("message")}
        if thought := self._said("reasoning"):
            message["reasoning_content"] = thought
        if self._calls:
            message |= {"content": message["content"] or None, "tool_calls": self._calls}
        return message

    def _said(self, kind: str) -> str:
        return "".join(item["content"][0]["text"] for item in self._items if item["type"] == kind)

    def _body(self, status: str) -> dict[str, Any]:
        is_over = status in ("completed", "incomplete")
        return self._wanted.shown | {
            "id": self.answer_id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._wanted.chat.common.model,
            "output": [dict(item) for item in self._items],
            "usage": self._usage() if is_over else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._chat.answers.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def _events(self, part: Part) -> Events:
        """Take in a part of the answer. Returns what a stream says of it."""
        events: Events = []
        if part.reasoning:
            events += self._grown("reasoning", part.reasoning)
            self._reasoning_tokens += 1
        if part.text:
            events += self._grown("message", part.text)
        for call in part.calls:
            events += self._end_of_item() + self._called(call)
        self._finish = part.finish or self._finish
        return events

    def _grown(self, kind: str, text: str) -> Events:
        """Add to the open item if it is of this kind, else to a new one."""
        events: Events = []
        if not self._is_open or self._items[-1]["type"] != kind:
            events = self._end_of_item() + self._begun(kind)
        item = self._items[-1]
        item["content"][0]["text"] += text
        name = _PARTS[kind][0]
        return [*events, self._about(f"{name}.delta", item, delta=text, **_WITH_LOGPROBS[name])]

    def _begun(self, kind: str) -> Events:
        name, others = _PARTS[kind]
        item: dict[str, Any] = {"id": f"{'msg' if kind == 'message' else 'rs'}_{uuid.uuid4().hex}", "type": kind}
        item |= {"status": "in_progress", "content": []}
        if kind == "message":
            item["role"] = "assistant"
        else:
            item["summary"] = []
        self._items.append(item)
        self._is_open = True
        added = self._of_item("added", dict(item))
        part = others | {"type": name, "text": ""}
        item["content"] = [dict(part)]
        return [added, self._about("content_part.added", item, part=part)]

    def _end_of_item(self) -> Events:
        """The events that end the open item, if there is one."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self._items[-1]
        item["status"] = "incomplete" if self._finish == "length" else "completed"
        part, name = item["content"][0], _PARTS[item["type"]][0]
        return [
            self._about(f"{name}.done", item, text=part["text"], **_WITH_LOGPROBS[name]),
            self._about("content_part.done", item, part=part),
            self._of_item("done", item),
        ]

    def _called(self, call: dict[str, Any]) -> Events:
        self._calls.append(call)
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        begun = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call["id"], "name": name}
        item = begun | {"arguments": arguments, "status": "completed"}
        self._items.append(item)
        place = {"item_id": item["id"], "output_index": len(self._items) - 1}
        event = "response.function_call_arguments"
        return [
            self._of_item("added", begun | {"arguments": "", "status": "in_progress"}),
            {"type": f"{event}.delta", "delta": arguments} | place,
            {"type": f"{event}.done", "arguments": arguments, "name": name} | place,
            self._of_item("done", item),
        ]

    def _of_item(self, what: str, item: dict[str, Any]) -> dict[str, Any]:
        return {"type": f"response.output_item.{what}", "output_index": len(self._items) - 1, "item": item}

    def _about(self, what: str, item: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """An event about the text of the last item."""
        place = {"item_id": item["id"], "output_index": len(self._items) - 1, "content_index": 0}
        return {"type": f"response.{what}"} | place | fields

    def _written(self, events: Events) -> bytes:
        parts = []
        for each in events:
            parts.append(event(each | {"sequence_number": self._sequence}, each["type"]))
            self._sequence += 1
        return b"".join(parts)
