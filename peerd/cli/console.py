"""What people see: results on standard output, logs and progress on standard error.

Knows terminals; knows no peers. The difficulty is that text may come from strangers (a hostile server
can make a model "say" anything, and errors travel): on a terminal, control characters would be commands.
So whatever goes to one passes through `printable`, and nothing is ever read as markup.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from unicodedata import category

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from peerd.compute.checkpoint.hub.settings import Transfer

# Beside the text, the sizes and the speed it fits into 80 columns.
_BAR_CHARS = 16
# Two of them differ by 6 random base58 digits: more than a screenful of peers ever needs.
_PEER_ID_TAIL = 6
# Unicode's control characters, and halves of characters, which cannot be encoded.
_COMMANDS = ("Cc", "Cs")
_PLAIN_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@cache
def screen() -> Console:
    """Standard error, as whatever stands behind it can show it; one for all, so that logs go above a spinner."""
    return Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """`text` without the control characters that a terminal would obey; line feeds and tabs stay."""
    return "".join(char for char in text if char in "\n\t" or category(char) not in _COMMANDS)


def write(text: str) -> None:
    """Results to standard output, at once. What a program reads from a pipe is left as it is."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def say(text: str) -> None:
    """A line for the person, on standard error."""
    print(printable(text), file=sys.stderr, flush=True)


class Working:
    """What `working` shows: a text, or a bar while something is transferred. Any thread may change it."""

    def __init__(self, display: Progress | None, text: str) -> None:
        self._display = display
        self._total = 0
        self._bar: TaskID | None = None
        self._text = display.add_task(printable(text), total=None) if display else TaskID(0)

    def update(self, text: str) -> None:
        """Say that something else goes on now."""
        if self._display:
            self._display.update(self._text, description=printable(text))

    def transferred(self, transfer: Transfer) -> None:
        """Show how far a transfer is, until it is done."""
        if self._display is None:
            return
        done, total = transfer.done_bytes, transfer.total_bytes
        if self._bar is not None and (done == total or total != self._total):
            self._display.remove_task(self._bar)
            self._bar = None
        if done == total:
            self._display.update(self._text, visible=True)
        elif self._bar is None:
            # What is there already counts for the bar, but not for the speed.
            name = f"fetching {printable(transfer.name)}"
            self._bar, self._total = self._display.add_task(name, total=total, completed=done), total
            self._display.update(self._text, visible=False)
        else:
            self._display.update(self._bar, completed=done)


class _Transferring(ProgressColumn):
    """A column that is there only while something is transferred."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> RenderableType:
        return self._column.render(task) if task.total else ""


@contextmanager
def working(text: str) -> Iterator[Working]:
    """Show that something goes on, on a terminal; elsewhere nothing is shown."""
    console = screen()
    if not console.is_terminal:
        yield Working(None, text)
        return
    bar = (BarColumn(_BAR_CHARS), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), *map(_Transferring, bar))
    with Progress(*columns, console=console, transient=True) as display:
        yield Working(display, text)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, their columns under each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def short(peer_id: object) -> str:
    """A PeerId as people can compare it: `12D3KooW..aB3xYz`."""
    text = str(peer_id)
    return f"{text[:8]}..{text[-_PEER_ID_TAIL:]}"


def set_up_logging(level: int, *, libraries: int = logging.WARNING) -> None:
    """Log our own messages from `level` and other libraries' from `libraries`, on standard error."""
    console = screen()
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(
            console=console, show_path=False, omit_repeated_times=False, log_time_format="%H:%M:%S", markup=False
        )
        handler.setFormatter(_Printable("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Printable(_PLAIN_FORMAT))
    logging.basicConfig(level=libraries, handlers=[handler], force=True)
    logging.getLogger("peerd").setLevel(level)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
