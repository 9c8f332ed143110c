"""Special tokens are left out of a text, except those that a reader of the text needs."""

from __future__ import annotations

import copy

from peerd.client.shown_tokens import decoder_showing


def test_only_the_named_special_tokens_are_seen(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>", "<|pad|>"]})
    tokenizer.add_tokens(["<plain>"])
    call, pad, plain, end = tokenizer.convert_tokens_to_ids(["<|call|>", "<|pad|>", "<plain>", "<end>"])
    ids = [*b"a ", call, pad, *"\u00e9".encode(), plain, end]
    assert decoder_showing(tokenizer, {"<|call|>"})(ids) == "a <|call|>\u00e9<plain>"
    assert decoder_showing(tokenizer, ())(ids) == tokenizer.decode(ids, skip_special_tokens=True)
