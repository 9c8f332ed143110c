"""Renders chat templates in a separate process, so that a template that loops for ever can be killed.

A template is a program that came with a model. Jinja's sandbox keeps it from files, but does not limit its time. A few
processes are started as they are needed; each renders one conversation after the other, and is replaced if it had to be
killed. One template never has all of them: if it loops, those of other models are rendered meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import trio

from peerd.line_process import LineProcess
from peerd.protocol.errors import InvalidRequest

RENDER_LIMIT_S = 1.0
# Each process takes 50 MB.
MOST_PROCESSES = 4
MOST_OF_A_TEMPLATE = 2


class ChatTemplates:
    """Renders conversations. Made by `open_chat_templates`."""

    def __init__(self, make_renderer: Callable[[], Renderer]) -> None:
        #: Whether a template uses tools, for those of which it is known. They are those of our models, so they are few.
        self.uses_tools: dict[str, bool] = {}
        self._make_renderer = make_renderer
        self._places = trio.Semaphore(MOST_PROCESSES)
        # The templates in use or waited for, each with the places that it may have.
        self._lanes: dict[str, _Lane] = {}
        self._renderers: list[Renderer] = []
        self._free: list[Renderer] = []

    def __repr__(self) -> str:
        return f"<ChatTemplates renderers={len(self._renderers)} free={len(self._free)} templates={len(self._lanes)}>"

    async def render(
        self,
        template: str,
        messages: list[dict[str, Any]],
        variables: dict[str, Any],
        *,
        opens_answer: bool = True,
        continues_last: bool = False,
    ) -> str:
        """The conversation as the model reads it, ready for its answer.

        opens_answer: whether an answer is begun; continues_last: the last message is left open, to be continued.
        Raises InvalidRequest if the template refuses these messages, fails, or takes longer than a second.
        """
        fields = {
            "template": template,
            "messages": messages,
            "variables": variables,
            "opens_answer": opens_answer,
            "continues_last": continues_last,
        }
        asked = json.dumps(fields).encode() + b"\n"
        lane = self._lanes.setdefault(template, _Lane())
        lane.users += 1
        try:
            async with lane.places, self._places:
                answer = await self._ask(asked)
        finally:
            lane.users -= 1
            if not lane.users:
                del self._lanes[template]
        if "error" in answer:
            raise InvalidRequest(f"the chat template refuses these messages: {answer['error']}")
        return str(answer["text"])

    async def close(self) -> None:
        """Kill the processes."""
        for renderer in self._renderers:
            await renderer.close()

    async def _ask(self, asked: bytes) -> dict[str, Any]:
        if not self._free:
            self._renderers.append(self._make_renderer())
            self._free.append(self._renderers[-1])
        renderer = self._free.pop()
        try:
            return await renderer.render(asked)
        finally:
            self._free.append(renderer)


class _Lane:
    """The places that one template may have, and how many callers use it or wait."""

    def __init__(self) -> None:
        self.places = trio.Semaphore(MOST_OF_A_TEMPLATE)
        self.users = 0


class Renderer(Protocol):
    """Renders one conversation at a time."""

    async def render(self, asked: bytes) -> dict[str, Any]:
        """The answer to a line of JSON: `text`, or `error`. Raises InvalidRequest, InternalError."""

    async def close(self) -> None:
        """Free what it holds; `render` takes it again."""


class TemplateProcess(LineProcess):
    """A process that renders, started when it is needed and killed when a template does not end."""

    def __init__(self) -> None:
        super().__init__("peerd.api.openai.template_process", "the chat template", RENDER_LIMIT_S)

    async def render(self, asked: bytes) -> dict[str, Any]:
        """The answer to a line of JSON. Raises InvalidRequest, InternalError."""
        return await self.ask(asked)


@asynccontextmanager
async def open_chat_templates() -> AsyncIterator[ChatTemplates]:
    """A renderer whose processes end with the block."""
    templates = ChatTemplates(TemplateProcess)
    try:
        yield templates
    finally:
        await templates.close()
