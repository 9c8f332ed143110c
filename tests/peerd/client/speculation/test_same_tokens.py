"""A draft model with other tokens is refused, and the line says what differs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from peerd.client.speculation.same_tokens import difference

WORDS = {"a": 0, "b": 1, "c": 2, "<s>": 3, "<end>": 4}


def tokenizer(ids=WORDS, special=("<s>", "<end>")):
    class Added(str):
        special = True

    added = {ids[token]: Added(token) for token in special}
    return SimpleNamespace(get_vocab=lambda: dict(ids), added_tokens_decoder=added)


CASES = {
    "more": (tokenizer(WORDS | {"d": 5}), "it has 6 tokens in place of 5"),
    "fewer": (tokenizer({"a": 0}, ()), "it has 1 tokens in place of 5"),
    "another": (tokenizer({"a": 0, "x": 1, "c": 2, "<s>": 3, "<end>": 4}), "it has no token 'b', which is token 1"),
    "moved": (tokenizer(WORDS | {"b": 2, "c": 1}), "'b' is its token 2, and token 1 here"),
    "not special": (tokenizer(special=["<s>"]), "'<end>' is a special token here and not of it"),
    "special": (tokenizer(special=["<s>", "<end>", "c"]), "'c' is a special token of it and not here"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_differs_is_named(case):
    draft, message = CASES[case]
    found = difference(tokenizer(), 8, draft, 8)
    assert found is not None
    assert message in found


def test_the_same_tokens_have_no_difference():
    assert difference(tokenizer(), 8, tokenizer(), 8) is None


def test_padded_embeddings_and_tokens_without_one_do_not_matter():
    extra = WORDS | {"<added by Transformers>": 5}
    assert difference(tokenizer(), 5, tokenizer(), 128) is None
    assert difference(tokenizer(extra), 5, tokenizer(), 5) is None


def test_a_draft_model_without_an_embedding_for_a_token_is_refused():
    assert difference(tokenizer(), 5, tokenizer(), 4) == "it has 4 tokens in place of 5"
