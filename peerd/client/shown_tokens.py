"""Decodes token ids so that certain special tokens are seen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from peerd.client.token_bytes import special_ids


def decoder_showing(tokenizer: Any, names: Collection[str]) -> Callable[[Sequence[int]], str]:
    """A function that decodes ids without special tokens, as usual, except those with these names."""
    hidden = {token_id for token_id in special_ids(tokenizer) if tokenizer.convert_ids_to_tokens(token_id) not in names}

    def decode(token_ids: Sequence[int]) -> str:
        seen = [token_id for token_id in token_ids if token_id not in hidden]
        return str(tokenizer.decode(seen, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode
