"""Turns token ids into text of which nothing has to be taken back, and ends it before a stop string.

A token may be half a character, and a text may end with what could be the beginning of a stop string. So a piece of
text is returned only when later tokens can no longer change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What an incomplete UTF-8 character decodes to.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Turns one row's token ids into text.

    A tokenizer joins tokens (spaces, bytes of one character). So each new text is decoded together with the last piece
    that has text, as context, and that piece's own text is then removed.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0
        self._given = 0

    def add(self, token_id: int, *, final: bool) -> str:
        """The text that became certain with this token; all remaining text if it is the `final` one."""
        self._ids.append(token_id)
        known = self._decode(self._ids[self._context : self._given])
        text = self._decode(self._ids[self._context :])
        if text.endswith(_INCOMPLETE) and not final:
            return ""
        piece = text[len(known) :]
        # A token without text (special, padding) is no context: after it the next token would lose its space.
        if piece:
            self._context = self._given
        self._given = len(self._ids)
        return piece

    def rest(self) -> str:
        """The text that waited for more tokens, when none come."""
        known = self._decode(self._ids[self._context : self._given])
        return self._decode(self._ids[self._context :])[len(known) :]


class StopFilter:
    """Passes text on up to the first of some `stops`, and leaves out the stop itself."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        #: The stop that was met; None if none was.
        self.met: str | None = None

    def add(self, piece: str, *, final: bool = False) -> str:
        """The part of the text so far that certainly comes before any stop. `met` says whether one was met."""
        if self.met is not None:
            return ""
        text = self._held + piece
        places = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            place, self.met = min(places)
            self._held = ""
            return text[:place]
        keep = 0 if final else self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_beginning(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop may begin."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
