"""Which tokens an answer's grammar allows next."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

import numpy as np
import torch
from llguidance import LLMatcher

from peerd.client.grammars.tokens import NO_TOKENS
from peerd.compute.prefixes import common_length
from peerd.protocol.errors import InvalidRequest

_MOST_ERROR_CHARACTERS = 300


class RowConstraint:
    """The grammar of one row, at any place of it.

    Each question brings the answer's tokens so far, and the grammar is led there, forwards or backwards. So guesses
    that turn out wrong, a step that failed and an answer that begins again need no care of their own.
    """

    def __init__(self, matcher: LLMatcher, size: int, ends: Collection[int]) -> None:
        self._matcher = matcher
        self._size = size
        self._ends = [token for token in ends if token < size]
        self._at: list[int] = []
        # A worker thread that nobody waits for any more may still be at it.
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<RowConstraint after {len(self._at)} tokens>"

    def allowed(self, answer: Sequence[int], width: int) -> torch.Tensor:
        """For each of `width` tokens, whether it may follow `answer`. Tokens that end an answer may where the grammar
        may end, and nowhere else. Raises InvalidRequest if the grammar takes too much work.
        """
        with self._lock:
            self._go_to(answer)
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            self._check()
            may_end = self._matcher.is_accepting()
        allowed = np.zeros(width, dtype=np.bool_)
        known = min(width, self._size)
        allowed[:known] = np.unpackbits(bits, count=known, bitorder="little")
        allowed[[token for token in self._ends if token < width]] = may_end
        return torch.from_numpy(allowed)

    def is_over(self, answer: Sequence[int]) -> bool:
        """Whether nothing may follow `answer` but its end. Raises InvalidRequest."""
        with self._lock:
            self._go_to(answer)
            return self._matcher.is_stopped()

    def _go_to(self, answer: Sequence[int]) -> None:
        same = common_length(self._at, answer, likely=len(self._at))
        if same < len(self._at):
            self._matcher.rollback(len(self._at) - same)
        if len(answer) > same:
            self._matcher.consume_tokens(list(answer[same:]))
        self._at = list(answer)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            problem = problem_of(self._matcher)
            raise InvalidRequest(f"the answer's grammar fails after {len(self._at)} tokens: {problem}")


def problem_of(matcher: LLMatcher) -> str:
    """What is wrong with a matcher's grammar."""
    error = matcher.get_error()
    if "NoExtension" in error:
        return "nothing can follow"
    return NO_TOKENS if NO_TOKENS in error else shortened(error)


def shortened(problem: str) -> str:
    """A library's error, in one line that people can read."""
    text = " ".join(problem.replace("<non-verbose/>", "").split())
    return text if len(text) <= _MOST_ERROR_CHARACTERS else f"{text[:_MOST_ERROR_CHARACTERS]}..."
