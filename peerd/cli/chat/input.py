"""Where the user's texts come from: an editor on a terminal, or the lines of a pipe.

Both wait in a worker thread. The editor sets the terminal to raw mode, in which Ctrl-C is a key and no signal; a thread
that is abandoned cannot set it back, so `keeping_terminal` does.
"""

from __future__ import annotations

import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import trio

from peerd.protocol.errors import InvalidRequest

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent


class Key(Enum):
    """What may come instead of a text."""

    INTERRUPT = "Ctrl-C"
    END = "Ctrl-D"


class Source(Protocol):
    """Gives the user's texts, one after the other."""

    async def read(self) -> str | Key:
        """The next text, which may have several lines."""


class Lines:
    """The lines of standard input. A line that ends with a backslash goes on in the next one."""

    async def read(self) -> str | Key:
        parts: list[str] = []
        while True:
            try:
                line = await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
            except (OSError, UnicodeError) as error:
                raise InvalidRequest(f"cannot read standard input: {error}") from None
            if not line:
                return "\n".join(parts) if parts else Key.END
            line = line.removesuffix("\n")
            if not line.endswith("\\"):
                return "\n".join([*parts, line])
            parts.append(line.removesuffix("\\"))


class Editor:
    """An editor for one text at a time, with the history of earlier ones. history: its file; None keeps none."""

    def __init__(self, history: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory

        kept = FileHistory(str(history)) if history is not None and _make_private(history) else InMemoryHistory()
        self._session: PromptSession[str] = PromptSession(
            history=kept, multiline=True, key_bindings=_bindings(), reserve_space_for_menu=0
        )

    async def read(self) -> str | Key:
        return await trio.to_thread.run_sync(self._ask, abandon_on_cancel=True)

    def _ask(self) -> str | Key:
        try:
            return self._session.prompt("> ", prompt_continuation="  ", handle_sigint=False)
        except KeyboardInterrupt:
            return Key.INTERRUPT
        except EOFError:
            return Key.END


def _bindings() -> KeyBindings:
    """Enter sends the text; Esc and Enter, or a backslash at the end, begin a new line."""
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()
    bindings.add("enter")(_send)
    bindings.add("escape", "enter")(_begin_line)
    return bindings


def _send(event: KeyPressEvent) -> None:
    buffer = event.current_buffer
    if buffer.document.text_before_cursor.endswith("\\"):
        buffer.delete_before_cursor()
        buffer.newline(copy_margin=False)
    else:
        buffer.validate_and_handle()


def _begin_line(event: KeyPressEvent) -> None:
    event.current_buffer.newline(copy_margin=False)


def _make_private(path: Path) -> bool:
    """Make the file, readable by its owner alone. Returns False where that cannot be."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)
    except OSError:
        return False
    return True


@contextmanager
def keeping_terminal() -> Iterator[None]:
    """Set the terminal of standard input back at the end, whatever was done to it."""
    try:
        before = termios.tcgetattr(0)
    except (termios.error, OSError):
        yield
        return
    try:
        yield
    finally:
        with suppress(termios.error, OSError):
            termios.tcsetattr(0, termios.TCSADRAIN, before)
