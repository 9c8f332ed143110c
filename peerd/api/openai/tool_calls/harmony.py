"""Reads answers in gpt-oss's form: messages, each with a channel, and a call as a message to a function.

`<|channel|>analysis<|message|>THOUGHTS<|end|><|start|>assistant<|channel|>commentary to=functions.NAME
<|constrain|>json<|message|>{...}<|call|>`; the text for the user is in the channel `final`.
"""

from __future__ import annotations

import re

from peerd.api.openai.tool_calls.call import Piece, Thought, loaded, made, possible_beginning

_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
HARMONY_MARKS = ("<|channel|>", "<|constrain|>", _MESSAGE, *_ENDS)


class HarmonyReader:
    """Gives the calls, the text for the user, and thoughts (the channel `analysis`)."""

    def __init__(self) -> None:
        self._held = ""
        # The header of the message that is being read, and None before one.
        self._header: str | None = None
        self._has_messages = False

    def add(self, text: str, *, final: bool = False) -> list[Piece]:
        """What became certain with this text; all that is left if it is the `final` one."""
        self._held += text
        pieces: list[Piece] = []
        while self._held and (self._take_header(pieces, final) if self._header is None else self._take(pieces, final)):
            pass
        return pieces

    def _take_header(self, pieces: list[Piece], final: bool) -> bool:
        header, mark, rest = self._held.partition(_MESSAGE)
        if mark:
            self._header, self._held = header, rest
            self._has_messages = True
            return True
        if final and not self._has_messages:
            # An answer without a header is all text.
            pieces.append(self._held)
        return False

    def _take(self, pieces: list[Piece], final: bool) -> bool:
        """Take the message's text, up to its end if that has come."""
        met = [place for end in _ENDS if (place := self._held.find(end)) >= 0]
        if met:
            body, rest = self._held[: min(met)], self._held[min(met) :]
            self._give(pieces, body, True)
            self._header, self._held = None, rest
            return True
        keep = 0 if final else possible_beginning(self._held, _ENDS)
        if not final and self._recipient is not None:
            return False
        body, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._give(pieces, body, final)
        return False

    @property
    def _recipient(self) -> str | None:
        found = _RECIPIENT.search(self._header or "")
        return found[1] if found else None

    def _give(self, pieces: list[Piece], body: str, whole: bool) -> None:
        channel = _CHANNEL.search(self._header or "")
        name = self._recipient
        call = made(name, loaded(body)) if name is not None and whole else None
        if call is not None:
            pieces.append(call)
        elif body:
            is_thought = name is None and channel is not None and channel[1] == "analysis"
            pieces.append(Thought(body) if is_thought else body)
