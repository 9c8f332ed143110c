"""A whole chat against a local API on a socket: texts, commands, errors and interruptions."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h11
import pytest
import trio

from peerd.cli.chat.api_client import AnswerFailed, AnswerRefused, ApiClient, Figures
from peerd.cli.chat.chat import Chat
from peerd.cli.chat.conversation import Conversation
from peerd.cli.chat.input import Key, Lines
from peerd.cli.chat.opening import Asked, run_chat
from peerd.cli.options.shared import JoinOptions
from peerd.cli.stopping import Interrupted
from peerd.protocol.errors import InvalidRequest, PeerdError, Unresponsive

pytestmark = pytest.mark.real_time

PEER = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
Respond = Callable[[str, Any, trio.SocketStream], Any]


def event(value: Any) -> bytes:
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()


def piece(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"delta": {"content": text}, "finish_reason": finish}]})


CHAIN = event({"choices": [], "peerd": {"chain": [{"peer": PEER, "start": 0, "end": 9}], "failovers": 1}})
USAGE = event({"choices": [], "usage": {"completion_tokens": 2}})
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


class Daemon:
    """A local API whose answers are scripted: each is sent as it is, and `b"wait"` waits for ever."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[dict[str, Any]] = []
        self.answers: list[list[bytes]] = []
        self.hung_up = trio.Event()
        self.waits = trio.Event()

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            target, body = await self._read(stream)
            if target == "/v1/models":
                await stream.send_all(_json({"data": [{"id": "smol"}, {"id": "big"}]}))
            elif target == "/peerd/v1/swarm":
                await stream.send_all(_json({"peer_id": PEER, "models": []}))
            elif target == "/peerd/v1/status":
                await stream.send_all(
                    _json({"peers": [{"peer_id": PEER, "rtt_ms": 1.5, "way": "direct", "relay": None}]})
                )
            else:
                self.asked.append(json.loads(body))
                for part in self.answers.pop(0):
                    if part == b"wait":
                        self.waits.set()
                        await stream.receive_some()
                        self.hung_up.set()
                        return
                    await stream.send_all(part)

    async def _read(self, stream: trio.SocketStream) -> tuple[str, bytes]:
        machine, target, body = h11.Connection(h11.SERVER), "", b""
        while True:
            found = machine.next_event()
            if found is h11.NEED_DATA:
                machine.receive_data(await stream.receive_some())
            elif isinstance(found, h11.Request):
                target = found.target.decode()
            elif isinstance(found, h11.Data):
                body += found.data
            else:
                return target, body


def _json(value: Any, status: int = 200) -> bytes:
    body = json.dumps(value).encode()
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@asynccontextmanager
async def open_daemon(folder: Path) -> AsyncIterator[Daemon]:
    daemon = Daemon(folder / "peerd.sock")
    socket = trio.socket.socket(trio.socket.AF_UNIX)
    await socket.bind(str(daemon.path))
    socket.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, daemon.serve, [trio.SocketListener(socket)])
        yield daemon
        nursery.cancel_scope.cancel()


class Script:
    """What the user types; a callable is called, and its result is typed."""

    def __init__(self, *texts: str | Key) -> None:
        self._texts = list(texts)

    async def read(self) -> str | Key:
        await trio.lowlevel.checkpoint()
        return self._texts.pop(0) if self._texts else Key.END


def chat_of(daemon: Daemon, *texts: str | Key, is_interactive: bool = True) -> Chat:
    return Chat(ApiClient(daemon.path), Conversation("smol"), Script(*texts), is_interactive=is_interactive)


async def test_an_answer_is_streamed_and_remembered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with open_daemon(tmp_path) as daemon:
        daemon.answers = [[HEAD, CHAIN, piece("Hel"), piece("lo", "stop"), USAGE, event("[DONE]")]] * 2
        chat = chat_of(daemon, "/system Be short.", "/set top_k 3", "Hi", "again")
        await chat.run()
    out, err = capsys.readouterr()
    assert out == "Hello\nHello\n"
    assert "(2 tokens, " in err
    assert "1 failover)" in err
    assert [message["content"] for message in daemon.asked[1]["messages"]] == ["Be short.", "Hi", "Hello", "again"]
    assert daemon.asked[1]["top_k"] == 3


async def test_without_a_terminal_only_answers_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with open_daemon(tmp_path) as daemon:
        daemon.answers = [[HEAD, piece("Hello"), event("[DONE]")]]
        await chat_of(daemon, "Hi", "  ", is_interactive=False).run()
    assert capsys.readouterr() == ("Hello\n", "")


@pytest.mark.parametrize(
    ("parts", "kind", "message"),
    [
        ([_json({"error": {"message": "there is no model"}}, 404)], AnswerRefused, "there is no model"),
        ([_json({"error": "busy"}, 429)], AnswerFailed, "busy"),
        ([_json([], 500)], AnswerFailed, "answered 500"),
        ([b"HTTP/1.1 500 X\r\nContent-Length: 3\r\n\r\n{{{"], AnswerFailed, "answered 500"),
        ([HEAD, piece("a"), event({"error": {"message": "no chain"}})], AnswerFailed, "no chain"),
        ([HEAD, piece("a")], AnswerFailed, "ended the answer in the middle"),
        ([HEAD], AnswerFailed, "ended the answer in the middle"),
        ([HEAD, event("nonsense")], AnswerFailed, "not a JSON object"),
        ([HEAD, event([])], AnswerFailed, "not a JSON object"),
        ([HEAD, event({})], AnswerFailed, "does not know"),
        ([HEAD, event({"choices": [3]})], AnswerFailed, "does not know"),
        ([HEAD, event({"choices": [], "usage": {"completion_tokens": "x"}})], AnswerFailed, "does not know"),
        ([b"nonsense\r\n\r\n"], AnswerFailed, "has gone"),
        ([], AnswerFailed, "has gone"),
    ],
)
async def test_an_answer_that_goes_wrong_says_why(
    tmp_path: Path, parts: list[bytes], kind: type[PeerdError], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with open_daemon(tmp_path) as daemon:
        daemon.answers = [parts, parts, [HEAD, piece("good"), event("[DONE]")]]
        with pytest.raises(kind, match=message):
            await chat_of(daemon, "Hi", is_interactive=False).run()
        chat = chat_of(daemon, "Hi", "again")
        await chat.run()
    # A person is told, and goes on.
    out, err = capsys.readouterr()
    assert out.endswith("good\n")
    assert f"Error: {message}" in err or message in err
    assert chat.conversation.turns[-1]["content"] == "good"


async def test_the_bytes_of_an_answer_may_come_in_any_pieces(tmp_path: Path) -> None:
    whole = HEAD + CHAIN + piece("Grüße") + piece(" \u2603", "length") + USAGE + event("[DONE]")
    async with open_daemon(tmp_path) as daemon:
        client = ApiClient(daemon.path)
        for size in (1, 7, len(whole)):
            daemon.answers = [[whole[start : start + size] for start in range(0, len(whole), size)]]
            figures = Figures()
            assert "".join([text async for text in client.answer({}, figures)]) == "Grüße \u2603"
            assert (figures.tokens, figures.finish, figures.failovers) == (2, "length", 1)
            assert figures.chain[0]["peer"] == PEER


async def test_commands_change_the_conversation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "talk.json"
    async with open_daemon(tmp_path) as daemon:
        daemon.answers = [[HEAD, CHAIN, piece(text), event("[DONE]")] for text in ("first", "second")]
        texts = ["Hi", "/retry", "/swarm", "/model big", "/model huge", f"/save {file}", f"/save {file}", "/help"]
        chat = chat_of(daemon, *texts, "/clear", "/set seed 7", "/set seed", "/system x", "/system -", "/quit", "lost")
        await chat.run()
    out, err = capsys.readouterr()
    assert out == "first\nsecond\n"
    assert [turn["content"] for turn in json.loads(file.read_text())["messages"]] == ["Hi", "second"]
    assert file.stat().st_mode & 0o777 == 0o600
    assert "the last answer came by 12D3KooW..AJU5SA 0:9" in err
    assert "there is no model 'huge' here; there are: smol, big" in err
    assert "exists already: choose another file" in err
    assert "seed 7\nall settings are the model's own\n" in err
    assert "x\nthere is no system prompt\n" in err
    assert (chat.conversation.model, chat.conversation.turns) == ("big", [])


# Ctrl-C.


async def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with open_daemon(tmp_path) as daemon:
        daemon.answers = [[HEAD, piece("Once"), b"wait"], [HEAD, piece("Twice"), event("[DONE]")]]
        chat = chat_of(daemon, "Hi", "again")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(chat.run)
            await daemon.waits.wait()
            signal.raise_signal(signal.SIGINT)
        assert daemon.hung_up.is_set()
    assert capsys.readouterr().out == "Once\nTwice\n"
    assert [turn["content"] for turn in chat.conversation.turns] == ["Hi", "Once", "again", "Twice"]


async def test_ctrl_c_twice_leaves(tmp_path: Path) -> None:
    async with open_daemon(tmp_path) as daemon:
        daemon.answers = [[HEAD, piece("Once"), b"wait"]]
        with pytest.raises(Interrupted) as left:
            await chat_of(daemon, Key.INTERRUPT, "/help", Key.INTERRUPT, Key.INTERRUPT).run()
        assert left.value.exit_code == 130
        scope, answer = trio.CancelScope(), trio.CancelScope()
        chat = chat_of(daemon)
        chat._answering = answer
        chat.signalled(signal.SIGINT, scope)
        assert (answer.cancel_called, scope.cancel_called) == (True, False)
        chat.signalled(signal.SIGINT, scope)
        assert scope.cancel_called


@pytest.mark.usefixtures("closed_terminals_are_heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_another_signal_leaves_in_the_middle_of_an_answer(tmp_path: Path, number: int) -> None:
    async with open_daemon(tmp_path) as daemon:
        daemon.answers = [[HEAD, piece("Once"), b"wait"]]
        chat, ended = chat_of(daemon, "Hi"), []

        async def run() -> None:
            try:
                await chat.run()
            except Interrupted as error:
                ended.append(error.exit_code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await daemon.waits.wait()
            signal.raise_signal(number)
        assert ended == [128 + number]


# Which daemon, which model, and the lines of a pipe.


class Pipe:
    def __init__(self, text: str) -> None:
        self._lines = text.splitlines(keepends=True)

    def isatty(self) -> bool:
        return False

    def readline(self) -> str:
        return self._lines.pop(0) if self._lines else ""


def asked_for(path: Path, model: str | None = None, **options: Any) -> Asked:
    return Asked(model=model, revision=None, joining=JoinOptions((), None, None), socket_path=path, **options)


async def test_a_line_that_ends_with_a_backslash_goes_on_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Pipe("a\\\nb\nc\\\n"))
    lines = Lines()
    assert [await lines.read() for _ in range(3)] == ["a\nb", "c", Key.END]


async def test_the_daemon_s_first_model_answers_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with open_daemon(tmp_path) as daemon:
        for model, expected in ((None, "smol"), ("big", "big")):
            monkeypatch.setattr(sys, "stdin", Pipe("Hi\n/quit\nlost\n"))
            daemon.answers = [[HEAD, piece("Hello"), event("[DONE]")]]
            await run_chat(asked_for(daemon.path, model, system="Be short."))
            assert daemon.asked[-1]["model"] == expected
            assert daemon.asked[-1]["messages"][0] == {"role": "system", "content": "Be short."}
    assert capsys.readouterr().out == "Hello\nHello\n"


async def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="peerd --client --model MODEL"):
        await run_chat(asked_for(tmp_path / "none.sock"))
    with pytest.raises(InvalidRequest, match=r"no daemon with a model listens .* and --bootstrap is missing"):
        await run_chat(asked_for(tmp_path / "none.sock", "org/name"))
    async with open_daemon(tmp_path) as daemon:
        with pytest.raises(InvalidRequest, match="the daemon has smol, big, and --bootstrap is missing"):
            await run_chat(asked_for(daemon.path, "org/name"))
        with pytest.raises(InvalidRequest, match="--bootstrap is missing"):
            await run_chat(asked_for(daemon.path, "smol", wants_own=True))
    with pytest.raises(Unresponsive, match="cannot be reached"):
        await ApiClient(tmp_path / "none.sock").get("/v1/models")


@pytest.mark.processes
async def test_a_terminal_gets_an_editor_whose_history_is_private(tmp_path: Path) -> None:
    """Types into a real terminal: a text of two lines, Ctrl-C into the answer, and Ctrl-D."""
    async with open_daemon(tmp_path) as daemon:
        daemon.answers = [[HEAD, piece("Once"), b"wait"]]
        near, far = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "peerd", "chat", "--socket", str(daemon.path)]

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                command, stdin=far, stdout=far, stderr=far, env=environment, start_new_session=True, close_fds=True
            )

        process = await trio.to_thread.run_sync(start)
        os.close(far)
        seen = bytearray()

        async def until(text: bytes) -> None:
            with trio.fail_after(60):
                while text not in seen:
                    seen.extend(await trio.to_thread.run_sync(os.read, near, 4096, abandon_on_cancel=True))
            del seen[: seen.index(text) + len(text)]

        try:
            await until(b"smol listens")
            await until(b"leaves\r\n")
            await until(b">")
            os.write(near, b"one\x1b\rtwo\r")
            await daemon.waits.wait()
            await until(b"Once")
            os.kill(process.pid, signal.SIGINT)
            await until(b"(stopped")
            await until(b">")
            os.write(near, b"\x04")
            assert await trio.to_thread.run_sync(process.wait) == 0
        finally:
            process.kill()
            process.wait()
        os.close(near)
        assert daemon.asked[0]["messages"][0]["content"] == "one\ntwo"
    history = tmp_path / "peerd/chat_history"
    assert "+one\n+two\n" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
