"""Renders chat templates in a separate process, so that a template that loops for ever can be killed.

A template is a program that came with a model. Jinja's sandbox keeps it from files, but does not limit its time. A few
processes are started as they are needed; each renders one conversation after the other, and is replaced if it had to be
killed. One template never has all of them: if it loops, those of other models are rendered meanwhile.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import trio

from peerd.protocol.errors import InternalError, InvalidRequest

RENDER_LIMIT_S = 1.0
# For importing the template engine, which may take long on a loaded machine.
_START_LIMIT_S = 60.0
_CHUNK_BYTES = 65536
_MAX_ANSWER_BYTES = 64 * 1024 * 1024
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


class TemplateProcess:
    """A process that renders, started when it is needed and killed when a template does not end."""

    def __init__(self) -> None:
        self._process: trio.Process | None = None
        self._rest = b""

    def __repr__(self) -> str:
        return f"<TemplateProcess {self._process}>"

    async def render(self, asked: bytes) -> dict[str, Any]:
        """The answer to a line of JSON. Raises InvalidRequest, InternalError."""
        await self._start()
        try:
            with trio.fail_after(RENDER_LIMIT_S):
                return await self._ask(asked)
        except trio.TooSlowError:
            await self.close()
            raise InvalidRequest(f"the chat template did not end within {RENDER_LIMIT_S:g} s") from None
        except (trio.BrokenResourceError, trio.EndOfChannel):
            await self.close()
            raise InvalidRequest("the chat template took more memory than it may") from None
        except BaseException:
            # Half an answer may be in the pipe.
            await self.close()
            raise

    async def close(self) -> None:
        """Kill the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                await pipe.aclose()

    async def _start(self) -> None:
        """Start the process if none is running. Raises InternalError."""
        if self._process is not None and self._process.poll() is None:
            return
        await self.close()
        self._rest = b""
        self._process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "peerd.api.openai.template_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            with trio.fail_after(_START_LIMIT_S):
                await self._read_line()
        except BaseException as error:
            await self.close()
            if isinstance(error, trio.EndOfChannel | trio.TooSlowError):
                raise InternalError("the process that renders chat templates did not start") from error
            raise

    async def _ask(self, asked: bytes) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        await self._process.stdin.send_all(asked)
        answer: dict[str, Any] = json.loads(await self._read_line())
        return answer

    async def _read_line(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        parts = [self._rest]
        size = len(self._rest)
        while b"\n" not in parts[-1]:
            chunk = await self._process.stdout.receive_some(_CHUNK_BYTES)
            size += len(chunk)
            if not chunk or size > _MAX_ANSWER_BYTES:
                raise trio.EndOfChannel
            parts.append(bytes(chunk))
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line


@asynccontextmanager
async def open_chat_templates() -> AsyncIterator[ChatTemplates]:
    """A renderer whose processes end with the block."""
    templates = ChatTemplates(TemplateProcess)
    try:
        yield templates
    finally:
        await templates.close()
