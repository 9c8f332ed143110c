"""`peerd top`: what it draws at any size, and how it behaves without a terminal and without a daemon."""

from __future__ import annotations

import copy
import io
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from rich.console import Console

from peerd.cli.watching import top
from peerd.cli.watching.top import as_text, show_top, view_of
from peerd.protocol.errors import InvalidRequest

ONE, TWO, US = (f"12D3KooW{letter * 44}" for letter in "abc")


def server(peer_id: str, start: int, end: int, **others: Any) -> dict[str, Any]:
    found = {"peer_id": peer_id, "start": start, "end": end, "state": "online", "positions_a_second": 12.5}
    found |= {"free_tokens": 4096, "rtt_ms": 7.25, "way": "relayed", "seen_since": 1000, "is_us": peer_id == US}
    return found | others


def run(start: int, end: int, servers: int) -> dict[str, int]:
    return {"start": start, "end": end, "servers": servers}


SWARM: dict[str, Any] = {
    "models": [
        {
            "name": "smol\x1b[31m",
            "server_count": 2,
            "coverage": [run(0, 10, 2), run(10, 20, 1), run(20, 30, 0)],
            "servers": [
                server(ONE, 0, 20),
                server(US, 0, 10, rtt_ms=None, way=None),
                server(TWO, 20, 30, state="joining"),
            ],
        }
    ],
    "history": [{"tokens": 0}, {"tokens": 50}, {"tokens": 100}],
}
STATUS = {
    "version": "1.2",
    "peer_id": US,
    "uptime_s": 65.0,
    "reachability": {"state": "public"},
    "peers": [{}, {}],
    "answering": 1,
    "serving": [{"blocks": "0:10"}],
    "sessions": 3,
}


def covered(servers: int) -> dict[str, Any]:
    swarm = copy.deepcopy(SWARM)
    swarm["models"][0]["coverage"] = [run(0, 30, servers)]
    return swarm


def drawn(swarm: dict[str, Any], width: int, height: int, **more: Any) -> list[str]:
    text = io.StringIO()
    view = view_of(swarm, STATUS, 1065.0, width=width, height=height, **more)
    Console(file=text, width=width, color_system=None).print(view)
    return text.getvalue().splitlines()


def test_it_shows_what_is_missing_who_serves_what_and_what_this_daemon_does() -> None:
    lines = as_text(SWARM, STATUS, 1065.0).splitlines()
    assert lines[0] == (
        "peerd 1.2   12D3KooW..cccccc   up 0:01:05   reach public   2 peers   1 answer   serves 0:10 to 3 sessions"
    )
    assert lines[1] == "tokens a minute: 100 in the last one, at most 100  ▁▄█"
    assert lines[3] == "smol[31m needs 10 more blocks: 20-29"
    assert lines[4] == "█" * 10 + "▄" * 10 + "·" * 10
    assert lines[5].split() == ["peer", "blocks", "speed", "free", "KV", "delay", "way", "seen", "for"]
    assert lines[6].split() == ["12D3KooW..aaaaaa", "0:20", "12.5/s", "4096", "7.2", "ms", "relayed", "0:01:05"]
    assert lines[7].split()[:3] == ["this", "peer", "0:10"]
    assert "not connected" in lines[7]
    assert lines[8].endswith("joining")


@pytest.mark.parametrize(
    ("servers", "words"), [(1, "one alone has each of blocks 0:30"), (2, "each block has two or more")]
)
def test_a_covered_model_says_how_well(servers: int, words: str) -> None:
    assert words in as_text(covered(servers), STATUS, 1065.0)


def test_a_daemon_without_models_says_what_to_do() -> None:
    assert "start it with --model" in as_text({"models": [], "history": []}, STATUS, 0.0)


@pytest.mark.parametrize("width", [20, 60, 200])
def test_it_fits_the_terminal(width: int) -> None:
    swarm = copy.deepcopy(SWARM)
    swarm["models"][0]["servers"] = [server(ONE, 0, 20)] * 50
    swarm["models"] = swarm["models"] * 2
    lines = drawn(swarm, width, 30)
    assert max(map(len, lines)) <= width
    if width > 20:
        assert len(lines) <= 30
        assert any(line.startswith("and 4") and "peerd peers" in line for line in lines)


def test_many_blocks_share_a_cell_that_shows_its_weakest() -> None:
    swarm = copy.deepcopy(SWARM)
    swarm["models"][0]["coverage"] = [run(0, 199, 2), run(199, 200, 0)]
    bar = next(line for line in drawn(swarm, 52, 30) if line.startswith("█"))
    assert bar.rstrip() == "█" * 49 + "·"


@asynccontextmanager
async def daemon_at(path: Path) -> AsyncIterator[list[bytes]]:
    asked: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            asked.append(await stream.receive_some())
            answer = SWARM if b"/swarm" in asked[-1] else STATUS
            await stream.send_all(f"HTTP/1.0 200 OK\r\n\r\n{json.dumps(answer)}".encode())

    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        yield asked
        nursery.cancel_scope.cancel()
    await trio.Path(path).unlink()


async def test_without_a_terminal_it_prints_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with daemon_at(tmp_path / "d.sock") as asked:
        await show_top(tmp_path / "d.sock", every_s=2.0)
    assert len(asked) == 2
    assert "needs 10 more blocks" in capsys.readouterr().out


async def test_without_a_daemon_it_says_so_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no peerd listens"):
        await show_top(tmp_path / "d.sock", every_s=2.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def test_on_a_terminal_it_draws_until_cancelled_waits_for_a_lost_daemon_and_leaves_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(top, "Console", lambda **options: Console(file=terminal, force_terminal=True, **options))
    path = tmp_path / "d.sock"
    async with trio.open_nursery() as nursery:
        async with daemon_at(path) as asked:
            await nursery.start(_started, path)
            await trio.sleep(5.0)
            assert len(asked) >= 4
        terminal.truncate(0)
        await trio.sleep(4.0)
        assert "no peerd listens" in terminal.getvalue()
        terminal.truncate(0)
        async with daemon_at(path):
            await trio.sleep(4.0)
            assert "needs 10 more blocks" in terminal.getvalue()
            assert "no peerd listens" not in terminal.getvalue().rpartition("peerd 1.2")[2]
        nursery.cancel_scope.cancel()
    # It began on the alternate screen, and gives the old one and the cursor back.
    assert terminal.getvalue().rstrip().endswith("\x1b[?1049l\x1b[?25h") or "\x1b[?1049l" in terminal.getvalue()
    assert "\x1b[?25h" in terminal.getvalue()


async def _started(path: Path, task_status: trio.TaskStatus[None]) -> None:
    task_status.started()
    await show_top(path, every_s=2.0)
