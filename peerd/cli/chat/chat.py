"""The loop of a chat: read a text or a command, answer it, and again.

Ctrl-C stops the answer that is coming, or clears the line that is being written; pressed a second time, with no text
between, it leaves. Another signal leaves at once.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from contextlib import aclosing

import trio

from peerd.cli.chat.api_client import ApiClient, Figures
from peerd.cli.chat.commands import Command, help_text, parse
from peerd.cli.chat.conversation import Conversation
from peerd.cli.chat.input import Key, Source
from peerd.cli.console import say, short, working, write
from peerd.cli.stopping import Interrupted, stop_signals
from peerd.cli.watching.peers import as_text, listed
from peerd.protocol.errors import InvalidRequest, PeerdError
from peerd.trio_tools import open_tasks


class Chat:
    """One chat. is_interactive: a person sits at a terminal, who is told of errors and may go on; without one, an error
    ends the chat.
    """

    def __init__(self, client: ApiClient, conversation: Conversation, source: Source, *, is_interactive: bool) -> None:
        self.conversation = conversation
        self._client = client
        self._source = source
        self._is_interactive = is_interactive
        self._figures = Figures()
        self._answering: trio.CancelScope | None = None
        self._interrupts = 0
        self._stopped_by: int | None = None

    async def run(self) -> None:
        """Chat until the user leaves. Raises Interrupted if a signal ended it; without a terminal, PeerdError."""
        async with open_tasks() as tasks:
            await tasks.start(self._watch_signals, tasks.cancel_scope)
            while await self._turn():
                pass
        if self._stopped_by is not None:
            raise Interrupted(self._stopped_by)

    async def _watch_signals(
        self, chat: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(*stop_signals()) as signals:
            task_status.started()
            async for number in signals:
                self.signalled(number, chat)

    def signalled(self, number: int, chat: trio.CancelScope) -> None:
        """React to a signal: stop the answer, or the `chat`."""
        self._interrupts += 1
        if number == signal.SIGINT and self._answering is not None and self._interrupts == 1:
            self._answering.cancel()
            return
        self._stopped_by = number
        chat.cancel()

    async def _turn(self) -> bool:
        """Read and do one thing. Returns False if the user leaves."""
        text = await self._source.read()
        if text is Key.INTERRUPT:
            self._interrupts += 1
            if self._interrupts > 1:
                self._stopped_by = signal.SIGINT
                return False
            say("Ctrl-C once more leaves; so does /quit")
            return True
        self._interrupts = 0
        if isinstance(text, Key):
            return False
        try:
            return await self._do(text)
        except PeerdError as error:
            if not self._is_interactive:
                raise
            say(f"Error: {error}")
        return True

    async def _do(self, text: str) -> bool:
        wanted = parse(text)
        if isinstance(wanted, Command):
            return await self._obey(wanted)
        if wanted.strip():
            self.conversation.ask(wanted)
            await self._answer()
        return True

    async def _answer(self) -> None:
        """Have the last question answered, and show the answer as it comes."""
        parts: list[str] = []
        figures, began, first_s = Figures(), time.monotonic(), None
        self._figures = figures
        with trio.CancelScope() as self._answering:
            try:
                async with aclosing(self._client.answer(self.conversation.request(), figures)) as pieces:
                    with working("waiting for the first token"):
                        parts.append(await anext(pieces, ""))
                    first_s = time.monotonic() - began
                    write(parts[0])
                    async for piece in pieces:
                        parts.append(piece)
                        write(piece)
            finally:
                self._answering = None
                self.conversation.answered("".join(parts))
                if parts:
                    write("\n")
        if self._is_interactive:
            say(_summary(figures, time.monotonic() - began, first_s))

    async def _obey(self, command: Command) -> bool:
        conversation, argument = self.conversation, command.argument
        match command.name:
            case "quit":
                return False
            case "help":
                say(help_text())
            case "clear":
                conversation.clear()
            case "retry":
                conversation.take_back_answer()
                await self._answer()
            case "save":
                await trio.to_thread.run_sync(_save, argument, conversation.to_json())
                say(f"{argument} holds the conversation")
            case "system":
                self._system(argument)
            case "set":
                self._set(argument)
            case "model":
                await self._model(argument)
            case "swarm":
                await self._swarm()
        return True

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = "" if text == "-" else text
        say(self.conversation.system or "there is no system prompt")

    def _set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        if name:
            self.conversation.set(name, value.strip())
        settings = [f"{name} {value:g}" for name, value in self.conversation.settings.items()]
        say(", ".join(settings) or "all settings are the model's own")

    async def _model(self, name: str) -> None:
        names = await model_names(self._client)
        if name:
            if name not in names:
                raise InvalidRequest(f"there is no model {name!r} here; there are: {', '.join(names)}")
            self.conversation.model = name
        say("\n".join(f"{'*' if each == self.conversation.model else ' '} {each}" for each in names))

    async def _swarm(self) -> None:
        found = listed(await self._client.get("/peerd/v1/swarm"), await self._client.get("/peerd/v1/status"))
        say(as_text(found, shutil.get_terminal_size().columns, time.time()))
        if self._figures.chain:
            say(f"the last answer came by {_chain(self._figures)}")


async def model_names(client: ApiClient) -> list[str]:
    """The names of the models that a local API offers. Raises PeerdError."""
    try:
        return [str(model["id"]) for model in (await client.get("/v1/models"))["data"]]
    except (KeyError, TypeError):
        raise InvalidRequest("what listens there is no daemon of peerd") from None


def _summary(figures: Figures, whole_s: float, first_s: float | None) -> str:
    """The figures of an answer as a line for people."""
    parts = [f"{figures.tokens} tokens"] if figures.tokens else ["stopped"]
    if figures.tokens > 1 and first_s is not None and whole_s > first_s:
        parts.append(f"{(figures.tokens - 1) / (whole_s - first_s):.1f} tokens/s")
    if first_s is not None:
        parts.append(f"first after {first_s:.2f} s")
    if figures.finish == "length":
        parts.append("cut off at max_tokens")
    if figures.failovers:
        parts.append(f"{figures.failovers} failover{'s' if figures.failovers > 1 else ''}")
    return f"({', '.join(parts)})"


def _chain(figures: Figures) -> str:
    return " -> ".join(f"{short(hop['peer'])} {hop['start']}:{hop['end']}" for hop in figures.chain)


def _save(name: str, text: str) -> None:
    """Write a new file that only its owner can read. Raises InvalidRequest."""
    path = os.path.expanduser(name)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(f"{text}\n")
    except FileExistsError:
        raise InvalidRequest(f"{path} exists already: choose another file") from None
    except (OSError, UnicodeError) as error:
        raise InvalidRequest(f"{path} cannot be written: {error}") from None
