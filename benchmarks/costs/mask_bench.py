"""Measures what a mask for a constrained answer costs a token: llguidance beside xgrammar, over a large vocabulary.

Run `python -m benchmarks.costs.mask_bench [--vocabulary FILE]`. FILE has a token a line, base64 and its rank, as Qwen's
`qwen.tiktoken` in the package `dashscope` has 151,643; without it there are as many random words, which share fewer
prefixes than real ones. xgrammar is measured only where it is installed. Every engine walks through the same answers,
cut greedily into the longest tokens.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import llguidance
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

WORDS = 151_643
ROUNDS = 3

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "city": {"enum": ["Rome", "Oslo", "Quito"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
    },
    "required": ["name", "age", "city", "tags"],
    "additionalProperties": False,
}
ANSWER = json.dumps(
    {"name": "Ada Lovelace, of London", "age": 36, "city": "Rome", "tags": ["engines", "poetical science"]},
    separators=(",", ":"),
)
FREE = json.dumps(
    {"text": "The quick brown fox jumps over it. " * 4, "list": [1, 2.5, None, {"a": True}]}, separators=(",", ":")
)
REGEX = r"(\d{1,3}\.){3}\d{1,3}( [a-z]+){2,9}"
ADDRESS = "192.168.17.204 is the printer in the hall"


class Walk(Protocol):
    """One answer under a grammar."""

    def mask(self) -> None:
        """Compute which tokens may come next."""

    def take(self, token: int) -> None:
        """Go on with a token. Raises ValueError if the grammar forbids it."""


class Vocabulary:
    """Tokens by their bytes, and an end-of-sequence token behind them."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = [*tokens, b"<|end|>"]
        self.eos_token_id = len(tokens)
        self.bos_token_id = None
        self.special_token_ids = [self.eos_token_id]
        self._ids = {token: number for number, token in enumerate(tokens)}
        self._longest = max(map(len, tokens))

    def __call__(self, text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        ids = []
        while data:
            size = next(size for size in range(self._longest, 0, -1) if data[:size] in self._ids)
            ids.append(self._ids[data[:size]])
            data = data[size:]
        return ids


class Llguidance:
    """The engine that peerd uses."""

    name = f"llguidance {metadata.version('llguidance')}"

    def __init__(self, vocabulary: Vocabulary) -> None:
        wrapped: Any = llguidance.TokenizerWrapper(vocabulary)
        self._tokenizer = LLTokenizer(wrapped)

    def schema(self, schema: Any) -> Walk:
        return self._walk(LLMatcher.grammar_from_json_schema(schema))

    def regex(self, regex: str) -> Walk:
        return self._walk(LLMatcher.grammar_from_regex(regex))

    def _walk(self, grammar: str) -> Walk:
        return _LlguidanceWalk(LLMatcher(self._tokenizer, grammar), self._tokenizer.vocab_size)


class _LlguidanceWalk:
    def __init__(self, matcher: LLMatcher, size: int) -> None:
        self._matcher = matcher
        self._mask = allocate_token_bitmask(1, size)

    def mask(self) -> None:
        fill_next_token_bitmask(self._matcher, self._mask)

    def take(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise ValueError(self._matcher.get_error())


class Xgrammar:
    """The other engine, measured in its own terms."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        import xgrammar

        self._x = xgrammar
        self.name = f"xgrammar {metadata.version('xgrammar')}"
        info = xgrammar.TokenizerInfo(vocabulary.tokens, stop_token_ids=[vocabulary.eos_token_id])
        # Without its cache, so that each compilation is measured.
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._size = len(vocabulary.tokens)

    def schema(self, schema: Any) -> Walk:
        return self._walk(self._compiler.compile_json_schema(json.dumps(schema), any_whitespace=True))

    def regex(self, regex: str) -> Walk:
        return self._walk(self._compiler.compile_regex(regex))

    def _walk(self, compiled: Any) -> Walk:
        return _XgrammarWalk(self._x.GrammarMatcher(compiled), self._x.allocate_token_bitmask(1, self._size))


class _XgrammarWalk:
    def __init__(self, matcher: Any, mask: Any) -> None:
        self._matcher = matcher
        self._mask = mask

    def mask(self) -> None:
        self._matcher.fill_next_token_bitmask(self._mask)

    def take(self, token: int) -> None:
        if not self._matcher.accept_token(token):
            raise ValueError(f"token {token} was refused")


def words_of(path: Path | None) -> list[bytes]:
    """The vocabulary of a file, or a made one: all bytes, and random words with and without a space before them."""
    if path is not None:
        return [base64.b64decode(line.split()[0]) for line in path.read_text().splitlines() if line.strip()]
    generator = random.Random(1)
    words = {bytes([byte]) for byte in range(256)}
    letters = "etaoinshrdlucmfwypvbgkqjxz" + '0123456789{}[]",: '
    while len(words) < WORDS:
        word = "".join(generator.choices(letters, weights=range(len(letters), 0, -1), k=generator.randint(2, 9)))
        words.add((" " * generator.randint(0, 1) + word).encode())
    return sorted(words)


def measure(name: str, vocabulary: Vocabulary, begin: Callable[[], Walk], answer: str) -> None:
    """Print the milliseconds of a compilation, of each mask and of taking a token; the best of some rounds each."""
    tokens = vocabulary(answer)
    compiled, rounds, takes = [], [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        walk = begin()
        compiled.append(time.perf_counter() - start)
        masks, taken = [], []
        for token in tokens:
            start = time.perf_counter()
            walk.mask()
            masked = time.perf_counter()
            walk.take(token)
            masks.append(masked - start)
            taken.append(time.perf_counter() - masked)
        rounds.append(masks)
        takes.append(statistics.mean(taken))
    best = [min(times) * 1000 for times in zip(*rounds, strict=True)]
    print(
        f"  {name:14} compile {min(compiled) * 1000:8.2f} ms, first mask {best[0]:7.3f}, mean {np.mean(best):7.3f},"
        f" median {np.median(best):7.3f}, worst {max(best):7.3f}, take {min(takes) * 1000:6.4f} ms"
        f" ({len(tokens)} tokens)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=Path)
    path = parser.parse_args().vocabulary
    vocabulary = Vocabulary(words_of(path))
    print(f"{len(vocabulary.tokens)} tokens, {'random words' if path is None else path.name}")
    for make in (Llguidance, Xgrammar):
        start = time.perf_counter()
        try:
            engine: Any = make(vocabulary)
        except ImportError as error:
            print(f"{make.__name__}: not measured, {error}")
            continue
        print(f"{engine.name}: {time.perf_counter() - start:.2f} s for the vocabulary, once a model")
        measure("schema", vocabulary, lambda: engine.schema(PERSON), ANSWER)  # noqa: B023
        measure("any object", vocabulary, lambda: engine.schema({"type": "object"}), FREE)  # noqa: B023
        measure("regex", vocabulary, lambda: engine.regex(REGEX), ADDRESS)  # noqa: B023


if __name__ == "__main__":
    main()
