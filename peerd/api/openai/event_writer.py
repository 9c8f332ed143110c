"""Writes answers in OpenAI's format: as one body, or as server-sent events of which `[DONE]` is the last."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from peerd.api.errors import ApiError
from peerd.api.openai.answers import Answers
from peerd.api.openai.bodies import Shape
from peerd.api.openai.requests import CommonFields
from peerd.client.picked import Picked

EVENT_STREAM = "text/event-stream; charset=utf-8"


def event(value: dict[str, Any], name: str = "") -> bytes:
    """A server-sent event."""
    first = f"event: {name}\n".encode() if name else b""
    return first + b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


class EventWriter:
    """Writes what a shape makes of the tokens. `count`: of answers."""

    content_type = EVENT_STREAM

    def __init__(self, answers: Answers, shape: Shape, count: int, common: CommonFields) -> None:
        self._answers = answers
        self._shape = shape
        self._count = count
        self._common = common
        self._chain: dict[str, Any] | None = None

    @property
    def answer_id(self) -> str:
        """The `id` in every piece."""
        return self._shape.answer_id

    def opening(self) -> bytes:
        """The pieces that come before the first token."""
        return self._events([piece for index in range(self._count) if (piece := self._shape.opening(index))])

    def piece(self, picked: Picked) -> bytes:
        """The piece for one token."""
        return self._events([*self._chain_news(), self._shape.piece(picked)])

    def closing(self) -> bytes:
        """The end, with the usage if the client asked for it."""
        usage = event(self._shape.usage(self._answers.usage.to_json())) if self._common.include_usage else b""
        return usage + b"data: [DONE]\n\n"

    def failure(self, error: ApiError) -> bytes:
        """The error as the last event."""
        return event(error.body)

    def whole(self, answers: Sequence[Sequence[Picked]]) -> dict[str, Any]:
        """All answers in one body."""
        return self._shape.whole(answers, self._answers.usage.to_json())

    def _events(self, pieces: Sequence[dict[str, Any]]) -> bytes:
        return b"".join(event(self._counted(piece)) for piece in pieces)

    def _counted(self, piece: dict[str, Any]) -> dict[str, Any]:
        """A piece with its field `usage`: null, as OpenAI has it, or what vLLM's clients ask for, the usage so far."""
        if not self._common.include_usage:
            return piece
        return piece | {"usage": self._answers.usage.to_json() if self._common.continuous_usage else None}

    def _chain_news(self) -> list[dict[str, Any]]:
        """The chain, where it was asked for and has changed since it was last said."""
        if not self._common.include_chain:
            return []
        chain = self._answers.chain()
        if chain == self._chain:
            return []
        self._chain = chain
        return [self._shape.chain(chain)]
