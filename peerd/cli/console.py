"""Writes to the terminal: results on standard output, progress on standard error.

Text may come from strangers (a hostile server can make a model "say" anything, and error messages travel), and control
characters would be commands to a terminal. So everything that goes to a terminal passes through `printable`, and no
text is ever interpreted as markup.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from unicodedata import category

from rich.console import Console, RenderableType
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

# With the text, the sizes and the speed it fits into 80 columns.
_BAR_CHARS = 16
# Two PeerIds differ in 6 random base58 digits: enough for more peers than fit on a screen.
_PEER_ID_TAIL = 6
# Unicode's control characters, and halves of characters, which cannot be encoded.
_COMMANDS = ("Cc", "Cs")


@cache
def screen() -> Console:
    """The console for standard error. There is one for all, so that logs appear above a spinner."""
    return Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """`text` without the control characters that a terminal would obey; line feeds and tabs stay."""
    return "".join(char for char in text if char in "\n\t" or category(char) not in _COMMANDS)


def write(text: str) -> None:
    """Write results to standard output, at once. Text for a pipe is left as it is."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def say(text: str) -> None:
    """Write a line for the user to standard error."""
    print(printable(text), file=sys.stderr, flush=True)


class Working:
    """What `working` shows: a text, or a bar while something is transferred. Any thread may change it."""

    def __init__(self, display: Progress | None, text: str) -> None:
        self._display = display
        self._total = 0
        self._bar: TaskID | None = None
        self._text = display.add_task(printable(text), total=None) if display else TaskID(0)

    def update(self, text: str) -> None:
        """Show another text."""
        if self._display:
            self._display.update(self._text, description=printable(text))

    def transferred(self, transfer: Transfer) -> None:
        """Show the progress of a transfer, until it is complete."""
        if self._display is None:
            return
        done, total = transfer.done_bytes, transfer.total_bytes
        if self._bar is not None and (done == total or total != self._total):
            self._display.remove_task(self._bar)
            self._bar = None
        if done == total:
            self._display.update(self._text, visible=True)
        elif self._bar is None:
            # Bytes that were here already count for the bar, but not for the speed.
            name = f"fetching {printable(transfer.name)}"
            self._bar, self._total = self._display.add_task(name, total=total, completed=done), total
            self._display.update(self._text, visible=False)
        else:
            self._display.update(self._bar, completed=done)


class _Transferring(ProgressColumn):
    """A column that is shown only during a transfer."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> RenderableType:
        return self._column.render(task) if task.total else ""


@contextmanager
def working(text: str) -> Iterator[Working]:
    """Show on a terminal that work goes on; show nothing elsewhere."""
    console = screen()
    if not console.is_terminal:
        yield Working(None, text)
        return
    bar = (BarColumn(_BAR_CHARS), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), *map(_Transferring, bar))
    with Progress(*columns, console=console, transient=True) as display:
        yield Working(display, text)


class Bar:
    """What `bar` shows: a text, and how much of the work is done. Any thread may change it."""

    def __init__(self, display: Progress | None, text: str) -> None:
        self._display = display
        self._task = display.add_task(printable(text), total=1.0) if display else TaskID(0)

    def update(self, share: float, text: str) -> None:
        """Show another text, and that this share of the work is done, from 0 to 1."""
        if self._display:
            self._display.update(self._task, completed=min(share, 1.0), description=printable(text))


@contextmanager
def bar(text: str) -> Iterator[Bar]:
    """Show on a terminal how much of some work is done, and how long the rest will take; show nothing elsewhere."""
    console = screen()
    if not console.is_terminal:
        yield Bar(None, text)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(_BAR_CHARS), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as display:
        yield Bar(display, text)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def short(peer_id: object) -> str:
    """A short form of a PeerId that people can compare: `12D3KooW..aB3xYz`."""
    text = str(peer_id)
    return f"{text[:8]}..{text[-_PEER_ID_TAIL:]}"
