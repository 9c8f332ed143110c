"""Reads answers in which calls stand between marks, or fill the answer."""

from __future__ import annotations

from collections.abc import Sequence

from peerd.api.openai.tool_calls.call import Call, Parse, Piece, Schemas, possible_beginning


class MarkedReader:
    """Finds calls that begin with the mark `start` and end with `end`, or where the answer ends if that is "".

    With `bare`, an answer that begins with a brace may be a call as well. White space around calls is no text. What
    does not parse is text.
    """

    def __init__(self, start: str, end: str, parse: Parse, schemas: Schemas, *, bare: bool = False) -> None:
        self._start = start
        self._end = end
        self._parse = parse
        self._schemas = schemas
        # An answer's first characters may begin a call without a mark.
        self._is_first = bare
        self._held = ""
        # The length of the mark with which `_held` begins, inside a call.
        self._inside: int | None = None
        # White space that is text only if text follows.
        self._space = ""
        self._called = False

    def add(self, text: str, *, final: bool = False) -> list[Piece]:
        """What became certain with this text; all that is left if it is the `final` one."""
        self._held += text
        pieces: list[Piece] = []
        while self._held and self._next(pieces, final):
            pass
        if final and self._space and not self._called:
            pieces.append(self._space)
        return pieces

    def _next(self, pieces: list[Piece], final: bool) -> bool:
        """Take the text up to the next mark, or a call. Returns whether there may be more."""
        if self._inside is not None:
            return self._take_call(pieces, final)
        if self._is_first:
            begun = self._held.lstrip()
            if not begun and not final:
                return False
            self._is_first = False
            if begun.startswith("{"):
                self._inside = 0
                return True
        place = self._held.find(self._start)
        if place >= 0:
            self._inside = len(self._start)
        else:
            place = len(self._held) - (0 if final else possible_beginning(self._held, [self._start]))
        self._take_text(pieces, place)
        return self._inside is not None

    def _take_text(self, pieces: list[Piece], length: int) -> None:
        text, self._held = self._held[:length], self._held[length:]
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            pieces.append(kept)

    def _take_call(self, pieces: list[Piece], final: bool) -> bool:
        assert self._inside is not None
        place = self._held.find(self._end, self._inside) if self._end else -1
        if place < 0 and not final:
            return False
        # A model may end its answer instead of its call.
        stop = place if place >= 0 else len(self._held)
        length = stop + len(self._end) if place >= 0 else stop
        calls = self._parse(self._held[self._inside : stop], self._schemas)
        self._inside = None
        if calls is None:
            self._take_text(pieces, length)
        else:
            self._take_calls(pieces, calls, length)
        return True

    def _take_calls(self, pieces: list[Piece], calls: Sequence[Call], length: int) -> None:
        self._held = self._held[length:]
        self._space = ""
        self._called = True
        pieces += calls
