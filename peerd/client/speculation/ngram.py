"""Drafts from the text itself: what followed the last time that the text ended as it ends now.

Code, quotations, tables and summaries repeat much of their prompt, and then these guesses are nearly free and mostly
right. This is prompt lookup decoding (A. Saxena, 2023; `prompt_lookup_num_tokens` of Transformers), with the longest
match in place of the first one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from peerd.client.speculation.drafts import Draft

#: The shortest end of the text that is looked for. One token alone predicts almost nothing.
SHORTEST_MATCH = 2
#: Matches longer than this are graded alike.
LONGEST_MATCH = 16
#: How many places with the same last tokens are compared, the latest first, so that a look-up has a bound.
_PLACES = 16


class NgramDrafter:
    """Finds the longest end of a text that occurred in it before. A `Drafter`; grades are lengths of matches."""

    def __init__(self) -> None:
        # For each pair of tokens, where in the text it ended last (the index after it).
        self._last: dict[int, int] = {}
        # For each end, where the same pair ended before; 0 if nowhere. A long text takes 100 bytes a token or so.
        self._before = array("i", [0] * SHORTEST_MATCH)

    def propose(self, text: Sequence[int], count: int) -> Draft:
        """What followed the latest of the longest matches. A match near the end of the text goes on periodically."""
        self._index(text)
        place, length = self._longest(text)
        if not place:
            return Draft()
        # Where the match's continuation reaches the end of the text, it goes on with the guesses themselves.
        period = len(text) - place
        return Draft(tuple(text[place + number % period] for number in range(count)), length)

    def _index(self, text: Sequence[int]) -> None:
        """Enter all pairs but the last, which would match itself."""
        for end in range(len(self._before), len(text)):
            pair = _pair(text, end)
            self._before.append(self._last.get(pair, 0))
            self._last[pair] = end

    def _longest(self, text: Sequence[int]) -> tuple[int, int]:
        """Where the longest match ends, and its length; 0, 0 if there is none."""
        best = (0, 0)
        for end in self._places(text):
            length = SHORTEST_MATCH
            while length < min(LONGEST_MATCH, end) and text[end - length - 1] == text[-length - 1]:
                length += 1
            if length > best[1]:
                best = (end, length)
            if length == LONGEST_MATCH:
                break
        return best

    def _places(self, text: Sequence[int]) -> Iterator[int]:
        """Where the text's last pair ended before, the latest first."""
        end = self._last.get(_pair(text, len(text)), 0) if len(text) >= SHORTEST_MATCH else 0
        for _ in range(_PLACES):
            if not end:
                return
            yield end
            end = self._before[end]


def _pair(text: Sequence[int], end: int) -> int:
    """The two tokens before `end` as one number: ids are below 2^32."""
    return text[end - 2] << 32 | text[end - 1]
