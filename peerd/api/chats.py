"""Answers chats for every API that the daemon speaks, in one way: from the fields to the tokens.

A dialect translates its request into a `ChatRequest` and writes what `Chat` gives in its own form. What lies between
(template, tools, sampling, limits, sessions) is here and below, and the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import trio
from starlette.requests import Request
from starlette.responses import Response

from peerd.api.fields import Fields, body_limit, parse_json, read_body
from peerd.api.models import Models
from peerd.api.openai.answering import Answering
from peerd.api.openai.answers import Answers, compiled_grammar, encode_prompt
from peerd.api.openai.bodies import ChatShape
from peerd.api.openai.chat_prompts import ChatPrompt, chat_prompt
from peerd.api.openai.chat_templates import ChatTemplates
from peerd.api.openai.requests import ChatRequest, CompletionRequest
from peerd.api.openai.responses import AnswerResponse, Writer
from peerd.api.openai.split_bodies import SplitChatShape
from peerd.api.web.history import History
from peerd.client.picked import Picked
from peerd.client.shown_tokens import decoder_showing

if TYPE_CHECKING:
    from peerd.client.model import SwarmModel

# A body of this size may hold so many token ids that checking them takes longer than other requests should wait.
_LARGE_BODY_BYTES = 65536

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """What a token adds to an answer. `calls` and `finish` are as in OpenAI's chats; `stop` is the text that ended it,
    if one did.
    """

    text: str
    reasoning: str
    calls: tuple[dict[str, Any], ...]
    finish: str | None
    stop: str | None


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat that can be answered now. `shape` makes OpenAI's JSON of its tokens: text, calls and the answer's end."""

    answers: Answers
    shape: ChatShape

    def part(self, picked: Picked) -> Part:
        """What this token adds to its answer. Each token must be given once, in order."""
        [choice] = self.shape.piece(picked)["choices"]
        delta = choice["delta"]
        return Part(
            delta.get("content") or "",
            delta.get("reasoning_content") or "",
            tuple(delta.get("tool_calls", ())),
            choice["finish_reason"],
            picked.stop,
        )


class Chats:
    """Reads requests, and answers chats with the daemon's models."""

    def __init__(self, models: Models, templates: ChatTemplates, history: History, answering: Answering) -> None:
        self.models = models
        self.history = history
        self.answering = answering
        self._templates = templates

    async def read(self, request: Request, read: Callable[[Fields], T]) -> T:
        """The request that `read` finds in the body's fields. Raises ApiError."""
        body = await read_body(request, body_limit(model.facts.max_length for _, model in self.models))
        if len(body) < _LARGE_BODY_BYTES:
            return read(parse_json(body))
        return await trio.to_thread.run_sync(lambda: read(parse_json(body)))

    async def prompt(self, wanted: ChatRequest) -> list[int]:
        """The token ids that the model reads. Raises ApiError, PeerdError."""
        model = self.models.named(wanted.common.model)
        return (await self._prompt(model, wanted))[1]

    async def open(self, wanted: ChatRequest) -> Chat:
        """Check a request, and prepare its answers. Raises ApiError, PeerdError."""
        model = self.models.named(wanted.common.model)
        rendered, prompt = await self._prompt(model, wanted)
        name, rows = wanted.common.model, wanted.common.rows
        shape, decode = ChatShape(name, model.token_bytes), None
        if rendered.reading is not None:
            parallel = wanted.tools is None or wanted.tools.parallel
            shape = SplitChatShape(name, model.token_bytes, rendered.reading.make_reader, rows, parallel=parallel)
            decode = decoder_showing(model.tokenizer, rendered.reading.marks)
        common = replace(wanted.common, grammar=rendered.grammar)
        grammar = await compiled_grammar(model, common)
        return Chat(Answers(model, common, [prompt], self.history.count_token, decode, grammar), shape)

    async def open_text(self, wanted: CompletionRequest) -> Chat:
        """As `open`, for one text that is continued without a template."""
        model, common = self.models.named(wanted.common.model), wanted.common
        prompt = await encode_prompt(model, wanted.prompts[0])
        grammar = await compiled_grammar(model, common)
        answers = Answers(model, common, [prompt], self.history.count_token, grammar=grammar)
        return Chat(answers, ChatShape(common.model, model.token_bytes))

    def respond(self, answers: Answers, writer: Writer, *, count: int, stream: bool) -> Response:
        """The response with these answers."""
        return AnswerResponse(answers, writer, count=count, stream=stream, answering=self.answering)

    async def _prompt(self, model: SwarmModel, wanted: ChatRequest) -> tuple[ChatPrompt, list[int]]:
        rendered = await chat_prompt(model, wanted, self._templates)
        return rendered, await model.tokenize(rendered.text, add_special_tokens=False)
