"""When tokens are indexed for grammars: beforehand if asked to, once, and never in the event loop's thread."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from peerd.client.grammars import vocabulary
from peerd.client.grammars.compiling import GrammarCompiler
from peerd.client.grammars.grammar import Grammar


class Head:
    """Notes what it was asked to run in a thread."""

    vocab_size = 257

    def __init__(self) -> None:
        self.ran: list[str] = []

    async def in_thread(self, function: Any, *arguments: Any, limiter: trio.CapacityLimiter) -> Any:
        await trio.lowlevel.checkpoint()
        self.ran.append(function.__name__)
        return function(*arguments)


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens were indexed, each time."""
    found: list[int] = []
    real = vocabulary.Vocabulary

    def index(tokens: list[bytes], *others: Any) -> vocabulary.Vocabulary:
        found.append(len(tokens))
        return real(tokens, *others)

    monkeypatch.setattr(vocabulary, "Vocabulary", index)
    return found


def compiler(head: Head) -> GrammarCompiler:
    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]
    tokenizer = SimpleNamespace(
        encode=lambda text, **_options: list(text.encode()), all_special_ids=[256], added_tokens_decoder={}
    )
    token_bytes = SimpleNamespace(all=lambda _size: tokens)
    return GrammarCompiler(cast(Any, head), tokenizer, cast(Any, token_bytes), None)


async def test_a_prepared_model_s_first_grammar_finds_its_tokens_indexed(indexed: list[int]) -> None:
    head = Head()
    grammars = compiler(head)
    await grammars.prepare()
    assert indexed == [257]
    row = (await grammars.compiled(Grammar.regex("ab"))).row([256])
    assert row.allowed([], 257).nonzero().flatten().tolist() == [ord("a")]
    await grammars.prepare()
    assert indexed == [257]
    assert head.ran == ["_indexed", "_compile", "_indexed"]


async def test_without_preparing_the_first_grammar_indexes_them(indexed: list[int]) -> None:
    grammars = compiler(Head())
    for _ in range(2):
        await grammars.compiled(Grammar.json_object())
    assert indexed == [257]


async def test_a_tokenizer_that_cannot_be_used_fails_the_grammars_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any) -> None:
        raise ValueError("no such tokens")

    monkeypatch.setattr(vocabulary, "Vocabulary", fail)
    grammars = compiler(Head())
    await grammars.prepare()
    with pytest.raises(ValueError, match="no such tokens"):
        await grammars.compiled(Grammar.json_object())
