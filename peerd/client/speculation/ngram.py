"""Drafts from the text itself: what followed the last time that the text ended as it ends now.

Code, quotations, tables and summaries repeat much of their prompt, and then these guesses are nearly free and mostly
right. This is prompt lookup decoding (A. Saxena, 2023; `prompt_lookup_num_tokens` of Transformers), with the longest
match in place of the first one.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

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
        # For each pair of tokens, where in the text it ended (the index after it), oldest first.
        self._ends: dict[tuple[int, ...], deque[int]] = defaultdict(lambda: deque(maxlen=_PLACES))
        self._indexed = SHORTEST_MATCH - 1

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
        for end in range(self._indexed + 1, len(text)):
            self._ends[tuple(text[end - SHORTEST_MATCH : end])].append(end)
        self._indexed = max(self._indexed, len(text) - 1)

    def _longest(self, text: Sequence[int]) -> tuple[int, int]:
        """Where the longest match ends, and its length; 0, 0 if there is none."""
        best = (0, 0)
        for end in reversed(self._ends.get(tuple(text[-SHORTEST_MATCH:]), ())):
            length = SHORTEST_MATCH
            while length < min(LONGEST_MATCH, end) and text[end - length - 1] == text[-length - 1]:
                length += 1
            if length > best[1]:
                best = (end, length)
            if length == LONGEST_MATCH:
                break
        return best
