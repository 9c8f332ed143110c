"""The terminal's display during work, and the log's record of it."""

from __future__ import annotations

import io
import logging

import pytest
import trio
from rich.console import Console

from peerd.checkpoints import LOG_EVERY_S, _logged, _until_cancelled
from peerd.cli import console
from peerd.compute.checkpoint.hub.settings import Transfer

MIB = 2**20


def transfer(done: float, total: float = 100) -> Transfer:
    return Transfer("org/name", int(done * MIB), int(total * MIB))


def test_a_terminal_shows_how_much_of_a_transfer_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100, markup=False)
    monkeypatch.setattr(console, "screen", lambda: screen)

    def shown() -> str:
        assert isinstance(screen.file, io.StringIO)
        screen.file.seek(0)
        screen.file.truncate()
        display._display.refresh()  # type: ignore[union-attr]
        return screen.file.getvalue()

    with console.working("reading [blocks]\x1b") as display:
        assert "reading [blocks]" in shown()
        display.transferred(transfer(25))
        assert "fetching org/name" in shown()
        assert "26.2/104.9 MB" in shown()
        display.update("joining")
        display.transferred(transfer(50))
        assert "fetching org/name" in shown()
        assert "52.4/104.9 MB" in shown()
        display.transferred(transfer(100))
        assert "joining" in shown()
        assert "MB" not in shown()


def test_elsewhere_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=False)
    monkeypatch.setattr(console, "screen", lambda: screen)
    with console.working("reading") as display:
        display.update("fetching")
        display.transferred(transfer(50))
    assert isinstance(screen.file, io.StringIO)
    assert screen.file.getvalue() == ""


def test_a_log_has_a_line_when_a_transfer_begins_one_now_and_then_and_one_when_it_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    seen: list[Transfer] = []
    watch = _logged(seen.append, lambda: now)
    with caplog.at_level(logging.INFO):
        watch(Transfer("org/name", 0, 0))  # a question to the hub
        for second in range(101):
            now = float(second)
            watch(transfer(second))
    assert LOG_EVERY_S == 30
    assert [record.getMessage() for record in caplog.records] == [
        "fetching 100 MiB of org/name",
        "fetching org/name: 30 MiB of 100 MiB, 1 MiB/s",
        "fetching org/name: 60 MiB of 100 MiB, 1 MiB/s",
        "fetching org/name: 90 MiB of 100 MiB, 1 MiB/s",
        "fetched 100 MiB of org/name in 100.0 s",
    ]
    assert len(seen) == 102


def test_what_is_here_already_does_not_count_as_speed_and_what_is_done_at_once_is_not_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    watch = _logged(lambda _: None, lambda: now)
    with caplog.at_level(logging.INFO):
        watch(transfer(1, 1))
        watch(transfer(40))
        now = 30.0
        watch(transfer(70))
    assert [record.getMessage() for record in caplog.records] == [
        "fetching 100 MiB of org/name",
        "fetching org/name: 70 MiB of 100 MiB, 1 MiB/s",
    ]


@pytest.mark.real_time
async def test_a_watcher_raises_in_its_thread_when_its_task_is_cancelled() -> None:
    seen: list[Transfer] = []

    def fetch() -> None:
        while True:
            watch(transfer(1))

    watch = _until_cancelled(seen.append)
    with trio.move_on_after(0.05) as scope:
        await trio.to_thread.run_sync(fetch)
    assert scope.cancelled_caught
    assert seen
