"""Token ids to text that never has to be taken back, and where a stop string ends it.

Knows text; knows neither models nor sessions. The difficulty: a token may be half a character, and what looks
like the beginning of a stop string may be one or not. So a piece is given out only once later tokens can no
longer change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A character of UTF-8 that is not complete yet decodes to this.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Turns one row's token ids into text.

    A tokenizer joins tokens (spaces, bytes of one character), so each new text is decoded with the last piece that has
    text as context, and that piece's own text is then left off.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0
        self._given = 0

    def add(self, token_id: int, *, final: bool) -> str:
        """The text that became certain with this token; all that is left with the `final` one."""
        self._ids.append(token_id)
        known = self._decode(self._ids[self._context : self._given])
        text = self._decode(self._ids[self._context :])
        if text.endswith(_INCOMPLETE) and not final:
            return ""
        piece = text[len(known) :]
        # A token without text of its own (special, padding) is no context: beside it the next would lose its space.
        if piece:
            self._context = self._given
        self._given = len(self._ids)
        return piece


class StopFilter:
    """Passes text on up to the first of some `stops`, which itself is left out."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, piece: str, *, final: bool = False) -> str:
        """What of the text so far is certain to come before any stop. `stopped` tells whether one was met."""
        if self.stopped:
            return ""
        text = self._held + piece
        met = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if met:
            self.stopped = True
            self._held = ""
            return text[: min(met)]
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
