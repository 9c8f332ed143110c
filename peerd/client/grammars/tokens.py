"""A model's tokens in the form in which llguidance takes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

# Why a text that a grammar forces cannot be said.
NO_TOKENS = "the model has no tokens for a text in it"


class Tokens:
    """The tokens in the library's form, with a token behind them that stands for the end of any answer.

    `greedy` turns a text into tokens where `encode`, the model's own way, changes the text.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self,
        tokens: Sequence[bytes],
        special: Collection[int],
        encode: Callable[[str], Sequence[int]],
        greedy: Callable[[str], list[int]],
    ) -> None:
        self.eos_token_id = len(tokens)
        self.tokens = [*tokens, b"<end of the answer>"]
        self.special_token_ids = [token for token in special if token < len(tokens)] + [self.eos_token_id]
        self._encode = encode
        self._greedy = greedy

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that the grammar forces."""
        ids = list(self._encode(text))
        # Some tokenizers add a space before a text.
        if not self._say(ids, text):
            ids = self._greedy(text)
        if not self._say(ids, text):
            # The library turns it into the matcher's error.
            raise ValueError(NO_TOKENS)
        return ids

    def _say(self, ids: Sequence[int], text: str) -> bool:
        return b"".join(self.tokens[token] for token in ids) == text.encode()
