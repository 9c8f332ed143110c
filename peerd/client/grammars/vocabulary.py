"""A model's tokens as grammars see them, and the compilation of grammars over them, by llguidance.

Grammars come from programs, and a small one may describe something huge. One that reaches a bound (`limits.py`) is
refused, or ends its answer with an error; it is computed in a worker thread and lets the event loop run meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence

from llguidance import LLMatcher, LLTokenizer

from peerd.client.grammars.constraint import RowConstraint, problem_of, shortened
from peerd.client.grammars.grammar import Grammar
from peerd.client.grammars.limits import parser_limits
from peerd.client.grammars.tokens import Tokens
from peerd.protocol.errors import InvalidRequest


class Vocabulary:
    """The tokens of one model."""

    def __init__(
        self, tokens: Sequence[bytes], special: Collection[int], encode: Callable[[str], Sequence[int]]
    ) -> None:
        """Index `tokens`, which takes a second for 150,000 of them and stops other threads meanwhile.

        `special`: those that no text contains, such as the one that ends an answer. `encode` turns a text into tokens,
        in the way that the model has learnt: where a grammar leaves no choice of text, it leaves none of tokens either.
        """
        self.size = len(tokens)
        # The library keeps what it is given, and what refers back to it would never be freed.
        this = weakref.ref(self)
        wrapped = Tokens(tokens, special, encode, lambda text: _greedy(this(), text))
        self._tokenizer = LLTokenizer(wrapped)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"<Vocabulary {self.size}>"

    def greedy(self, text: str) -> list[int]:
        """The tokens of a text, each the longest that fits."""
        return self._tokenizer.greedy_tokenize(text)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Compile a grammar. Raises InvalidRequest, which says what is wrong with it."""
        try:
            definition = grammar.definition()
        except ValueError as error:
            raise InvalidRequest(shortened(str(error))) from None
        matcher = LLMatcher(self._tokenizer, definition, log_level=0, limits=parser_limits())
        if not matcher.is_error():
            # Some limits are only reached by the first mask.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise InvalidRequest(problem_of(matcher))
        return CompiledGrammar(self, matcher)


class CompiledGrammar:
    """A grammar over one model's tokens. For the rows of one request: they share the automaton and its bounds."""

    def __init__(self, vocabulary: Vocabulary, matcher: LLMatcher) -> None:
        self._vocabulary = vocabulary
        self._matcher = matcher

    def row(self, ends: Collection[int]) -> RowConstraint:
        """What one answer may say, from its beginning. `ends`: the tokens that may end it."""
        return RowConstraint(self._matcher.deep_copy(), self._vocabulary.size, ends)


def _greedy(vocabulary: Vocabulary | None, text: str) -> list[int]:
    return [] if vocabulary is None else vocabulary.greedy(text)
