"""A draft head at work: it guesses how a text goes on from the last hidden states that the client has of it.

Synchronous, and for one thread at a time. Of each text it keeps what its attention reads, from the first position whose
hidden state it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from peerd.compute.drafting.network import DraftNetwork, Keys
from peerd.compute.engine.greedy_text import Guess
from peerd.compute.model.head import Head


class DraftHead:
    """A network with what it needs of the model: embeddings, the final norm, and the LM head's rows of its tokens."""

    def __init__(self, network: DraftNetwork, head: Head, device: str | torch.device = "cpu") -> None:
        self._network = network.to(device)
        self._head = head
        self._device = torch.device(device)
        weight, bias = head.output_rows(network.tokens)
        self._weight = weight.to(self._device)
        self._bias = None if bias is None else bias.to(self._device)

    @property
    def width(self) -> int:
        """The width of the model's hidden states."""
        return self._network.shape.width

    @torch.inference_mode()
    def read(
        self, hidden: torch.Tensor, tokens: Sequence[int], start: int, past: Keys | None
    ) -> tuple[torch.Tensor, Keys]:
        """What the decoder should give out after these positions, `[1, 1, width]`, and what attention may read later.

        hidden: the last block's outputs, `[n, width]`, of positions from `start` on. tokens: the text's tokens after
        them. past: what this gave for the positions before.
        """
        given = self._head.last_hidden(hidden).to(self._device)
        out, seen = self._network(given[None], self._embedded(tokens, start + 1), past)
        return out[:, -1:], seen

    @torch.inference_mode()
    def go_on(self, predicted: torch.Tensor, token: int, position: int, past: Keys) -> tuple[torch.Tensor, Keys]:
        """As `read` for one position, for which the prediction stands in place of the decoder's output."""
        out, seen = self._network(predicted, self._embedded([token], position), past)
        return out, seen

    @torch.inference_mode()
    def guess(self, predicted: torch.Tensor) -> Guess:
        """The most likely token after a prediction `[1, 1, width]`."""
        logits = torch.nn.functional.linear(predicted[0, 0], self._weight, self._bias)
        best = int(logits.argmax())
        return Guess(int(self._network.tokens[best]), float(torch.exp(logits[best] - logits.logsumexp(0))))

    def _embedded(self, tokens: Sequence[int], start: int) -> torch.Tensor:
        positions = torch.arange(start, start + len(tokens))
        return self._head.embed(torch.tensor(tokens, dtype=torch.long), positions).float().to(self._device)[None]


class HeadText:
    """One text: `add` its hidden states as they come, and ask for `guesses`."""

    def __init__(self, head: DraftHead) -> None:
        self._head = head
        # Hidden states that were not read yet, and the position of the first of them.
        self._unread: list[torch.Tensor] = []
        self._end = 0
        self._read_until = 0
        self._past: Keys | None = None
        self._predicted: torch.Tensor | None = None

    def behind(self, text: Sequence[int]) -> int:
        """How many positions of `text` were added and not read yet."""
        return min(self._end, len(text) - 1) - self._read_until

    def add(self, start: int, hidden: torch.Tensor) -> None:
        """Take the last block's outputs, `[n, width]`, of positions from `start` on. Known ones are left out.

        If positions are missing before `start`, the text begins there.
        """
        if start > self._end:
            self._unread.clear()
            self._past = self._predicted = None
            self._read_until = self._end = start
        if start + len(hidden) > self._end:
            self._unread.append(hidden[self._end - start :])
            self._end = start + len(hidden)

    def read(self, text: Sequence[int], pause: Callable[[], None]) -> None:
        """Read what was added. `pause` is called before each computation; it may raise."""
        if not self._unread or self._end >= len(text):
            return
        pause()
        start, hidden = self._read_until, torch.cat(self._unread)
        following = text[start + 1 : self._end + 1]
        self._predicted, self._past = self._head.read(hidden, following, start, self._past)
        self._unread.clear()
        self._read_until = self._end

    def guesses(self, text: Sequence[int], pause: Callable[[], None]) -> Iterator[Guess]:
        """What comes after `text`, token by token, as long as it is asked; nothing before something was added.

        Tokens whose hidden states were not added are taken as guesses that are right. `pause` is as for `read`.
        """
        self.read(text, pause)
        predicted, past = self._predicted, self._past
        if predicted is None or past is None or self._end >= len(text):
            return
        for position in range(self._end + 1, len(text)):
            pause()
            predicted, past = self._head.go_on(predicted, text[position], position, past)
        position = len(text)
        while True:
            guess = self._head.guess(predicted)
            yield guess
            pause()
            predicted, past = self._head.go_on(predicted, guess.token, position, past)
            position += 1
