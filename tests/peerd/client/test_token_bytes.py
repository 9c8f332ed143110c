"""The bytes of tokens, in the vocabularies that there are."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from peerd.client.token_bytes import TokenBytes, shown


@pytest.fixture
def sentence_pieces():
    """A vocabulary with a token for each byte that no other token covers, as Llama 2 has it."""
    words = {"<unk>": 0, "\u2581Hello": 1, "<0xE6>": 2, "<0x97>": 3, "\u65e5": 4, "<s>": 5, "\u2581": 6}
    backend = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))


@pytest.mark.parametrize(
    ("token", "data"),
    [(1, b" Hello"), (2, b"\xe6"), (3, b"\x97"), (4, "\u65e5".encode()), (5, b"<s>"), (6, b" "), (999, b"")],
)
def test_tokens_of_sentence_pieces(sentence_pieces, token, data):
    assert sentence_pieces.of(token) == data


@pytest.mark.parametrize("token", [0, 32, 0xE6, 255])
def test_each_token_of_a_byte_level_vocabulary_has_its_bytes(byte_tokenizer, token):
    assert TokenBytes(byte_tokenizer).of(token) == bytes([token])


def test_the_token_that_ends_an_answer_is_shown_by_its_name(byte_tokenizer):
    assert TokenBytes(byte_tokenizer).of(256) == b"<end>"


def test_only_parts_of_characters_are_shown_as_bytes():
    assert shown(" H\u00e9".encode()) == " H\u00e9"
    assert shown(b"\xe6\x97") == "bytes:\\xe6\\x97"
