"""Compiles grammars for one model, without the event loop waiting."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import trio

from peerd.client.grammars.grammar import Grammar
from peerd.client.token_bytes import TokenBytes, special_ids

if TYPE_CHECKING:
    from peerd.client.grammars.checking import GrammarCheck
    from peerd.client.grammars.vocabulary import CompiledGrammar, Vocabulary
    from peerd.exchange.head_task import HeadTask


class GrammarCompiler:
    """Compiles one grammar at a time. The model's tokens are indexed by `prepare`, else with the first one."""

    def __init__(self, head: HeadTask, tokenizer: Any, token_bytes: TokenBytes, check: GrammarCheck | None) -> None:
        """check: where grammars are compiled first, in case that they never end; None for trusted ones."""
        self._head = head
        self._tokenizer = tokenizer
        self._token_bytes = token_bytes
        self._check = check
        self._limiter = trio.CapacityLimiter(1)
        self._vocabulary: Vocabulary | None = None

    async def compiled(self, grammar: Grammar) -> CompiledGrammar:
        """Raises InvalidRequest, which says what is wrong with the grammar."""
        if self._check is not None:
            await self._check.check(grammar)
        return await self._head.in_thread(self._compile, grammar, limiter=self._limiter)

    async def prepare(self) -> None:
        """Index the model's tokens now: with 150,000 of them that stops all threads for a second or two."""
        # A tokenizer that the library cannot use fails the grammars, and nothing else.
        with suppress(ValueError):
            await self._head.in_thread(self._indexed, limiter=self._limiter)

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        return self._indexed().compile(grammar)

    def _indexed(self) -> Vocabulary:
        if self._vocabulary is None:
            from peerd.client.grammars.vocabulary import Vocabulary

            def encode(text: str) -> list[int]:
                return list(self._tokenizer.encode(text, add_special_tokens=False))

            tokens = self._token_bytes.all(self._head.vocab_size)
            self._vocabulary = Vocabulary(tokens, special_ids(self._tokenizer), encode)
        return self._vocabulary
