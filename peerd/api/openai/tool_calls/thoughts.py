"""Splits thoughts off answers of models that write them between `<think>` and `</think>`.

The first mark may be in the prompt already, or may never come; a model that may think need not.
"""

from __future__ import annotations

from collections.abc import Callable

from peerd.api.openai.tool_calls.call import Piece, Reader, Thought, possible_beginning

THINK_MARKS = ("<think>", "</think>")
_BEGIN, _END = THINK_MARKS


class ThoughtReader:
    """Gives thoughts, and what `inner` makes of the text behind them. White space around thoughts is left out.

    `begins_inside`: the answer begins with a thought, whether or not the mark comes.
    """

    def __init__(self, inner: Reader | None, *, begins_inside: bool) -> None:
        self._inner = inner
        self._begins_inside = begins_inside
        self._take: Callable[[list[Piece], bool], None] = self._take_beginning
        self._held = ""
        # Whether some of the thought was given.
        self._has_begun = False

    def add(self, text: str, *, final: bool = False) -> list[Piece]:
        """What became certain with this text; all that is left if it is the `final` one."""
        self._held += text
        pieces: list[Piece] = []
        state = None
        while state != self._take:
            state = self._take
            state(pieces, final)
        return pieces

    def _take_beginning(self, pieces: list[Piece], final: bool) -> None:
        begun = self._held.lstrip()
        if begun.startswith(_BEGIN):
            self._held = begun.removeprefix(_BEGIN)
            self._take = self._take_thought
        elif final or not _BEGIN.startswith(begun):
            self._take = self._take_thought if self._begins_inside else self._take_text

    def _take_thought(self, pieces: list[Piece], final: bool) -> None:
        thought, end, rest = self._held.partition(_END)
        if end or final:
            self._held = rest
            self._take = self._take_space
        else:
            keep = possible_beginning(thought, [_END])
            kept = thought[: len(thought) - keep].rstrip()
            self._held = self._held[len(kept) :]
            thought = kept
        self._give(pieces, thought, bool(end or final))

    def _give(self, pieces: list[Piece], thought: str, whole: bool) -> None:
        if not self._has_begun:
            thought = thought.lstrip()
        if whole:
            thought = thought.rstrip()
        if thought:
            self._has_begun = True
            pieces.append(Thought(thought))

    def _take_space(self, pieces: list[Piece], final: bool) -> None:
        """Leave out the space between a thought and the text."""
        self._held = self._held.lstrip()
        if self._held or final:
            self._take = self._take_text

    def _take_text(self, pieces: list[Piece], final: bool) -> None:
        text, self._held = self._held, ""
        if self._inner is not None:
            pieces += self._inner.add(text, final=final)
        elif text:
            pieces.append(text)
