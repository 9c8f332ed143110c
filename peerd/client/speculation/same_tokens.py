"""Whether two models have the same tokens, so that one can guess for the other: what differs, in a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def difference(tokenizer: Any, vocab_size: int, draft: Any, draft_vocab_size: int) -> str | None:
    """What differs between a model's tokenizer and a draft model's; None if nothing that matters does.

    The sizes are those of the embeddings. Publishers round them up differently, so only what a tokenizer names counts.
    Blocks the thread for a tenth of a second: run it in a worker thread.
    """
    ours, theirs = _ids(tokenizer, vocab_size), _ids(draft, draft_vocab_size)
    if ours.keys() != theirs.keys() and len(ours) != len(theirs):
        return f"it has {len(theirs)} tokens in place of {len(ours)}"
    for token, number in ours.items():
        if token not in theirs:
            return f"it has no token {token!r}, which is token {number} here"
        if theirs[token] != number:
            return f"{token!r} is its token {theirs[token]}, and token {number} here"
    special, its = _special(tokenizer, ours), _special(draft, theirs)
    if special != its:
        token = min(special ^ its, key=ours.__getitem__)
        return f"{token!r} is a special token {'of it and not here' if token in its else 'here and not of it'}"
    return None


def _ids(tokenizer: Any, vocab_size: int) -> Mapping[str, int]:
    """The tokens that the model has an embedding for."""
    return {token: number for token, number in tokenizer.get_vocab().items() if number < vocab_size}


def _special(tokenizer: Any, ids: Mapping[str, int]) -> frozenset[str]:
    added = tokenizer.added_tokens_decoder.values()
    return frozenset(str(token) for token in added if token.special and str(token) in ids)
