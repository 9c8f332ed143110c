"""Decodes token ids so that certain special tokens are seen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any


def decoder_showing(tokenizer: Any, names: Collection[str]) -> Callable[[Sequence[int]], str]:
    """A function that decodes ids without special tokens, as usual, except those with these names."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    hidden = {token_id for token_id in special if tokenizer.convert_ids_to_tokens(token_id) not in names}

    def decode(token_ids: Sequence[int]) -> str:
        seen = [token_id for token_id in token_ids if token_id not in hidden]
        return str(tokenizer.decode(seen, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode
