"""The bytes that each token stands for, also where they are only a part of a character.

A decoder turns such a token into U+FFFD, as it does with every other part of a character, so that different tokens look
alike. The vocabulary still has the bytes, in one of two forms: byte-level vocabularies write each byte as a character
of an alphabet of 256; others have a token `<0xE6>` for each byte, and write a space as U+2581.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"


class TokenBytes:
    """Looks the bytes of a tokenizer's tokens up."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def of(self, token_id: int) -> bytes:
        """What the token adds to a text. A special token has the bytes of its name."""
        return self._bytes(token_id, self._tokenizer.all_special_tokens)

    def all(self, count: int) -> list[bytes]:
        """What each of the first `count` tokens adds to a text."""
        special = frozenset(self._tokenizer.all_special_tokens)
        return [self._bytes(token_id, special) for token_id in range(count)]

    def _bytes(self, token_id: int, special: Collection[str]) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):
            # Some models have more outputs than tokens.
            return b""
        if token in special:
            return token.encode()
        if self._alphabet and all(character in self._alphabet for character in token):
            return bytes(self._alphabet[character] for character in token)
        if byte := _BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        if _SPACE in token and not self._alphabet:
            return token.replace(_SPACE, " ").encode()
        text = self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text).encode()

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        """The byte of each character of a byte-level vocabulary; empty if it is none."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or "ByteLevel" not in repr(backend.decoder):
            return {}
        alphabet: Callable[[], dict[int, str]] = bytes_to_unicode
        return {character: byte for byte, character in alphabet().items()}


def special_ids(tokenizer: Any) -> set[int]:
    """The tokens that no text contains: they begin, end and divide texts."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | set(tokenizer.all_special_ids)


def shown(data: bytes) -> str:
    """The text of a token; for a part of a character its bytes, as OpenAI's API writes them: `bytes:\\xe6\\x97`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
