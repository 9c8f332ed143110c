"""A whole model on one device that continues texts greedily: it guesses tokens for a larger model.

Synchronous, and for one thread at a time. A text's KV stays between calls. What the text has in common with the last
one is not computed again; what follows is cut off, as wrong guesses are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peerd.compute.attention.attention import register_attention
from peerd.compute.device.failures import is_device_lost, is_out_of_memory
from peerd.compute.engine.batch_parts import run_in_parts
from peerd.compute.engine.engine import BaseEngine, Engine
from peerd.compute.errors import NoRoomError
from peerd.compute.model.head import Head, load_head
from peerd.compute.model.span_model import load_span
from peerd.compute.prefixes import common_length
from peerd.compute.steps import EngineStep
from peerd.protocol.rows import DECODE_POSITIONS, RowSlice, SessionSize
from peerd.protocol.span import Span

if TYPE_CHECKING:
    from peerd.compute.checkpoint.checkpoint import Checkpoint

# Positions that are computed without a pause. A caller who gives up waits for them.
_AT_ONCE = 128


@dataclass(frozen=True, slots=True)
class Guess:
    """A token that may come next, and the probability that the model itself gives it."""

    token: int
    chance: float


class WholeModel:
    """A model's head and all its blocks, with KV for a number of texts."""

    def __init__(self, head: Head, engine: BaseEngine, max_length: int) -> None:
        self._head = head
        self._engine = engine
        self._max_length = max_length
        self._open: set[GreedyText] = set()

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return self._head.vocab_size

    @property
    def max_length(self) -> int:
        """How many positions a text may have."""
        return self._max_length

    @property
    def free_positions(self) -> int:
        """How many more positions of KV texts may take."""
        return self._engine.free_tokens

    def open(self, text: GreedyText, length: int) -> None:
        """Commit KV for a text. Raises NoRoomError, ContextTooLongError."""
        self._engine.open(text, SessionSize(length, max_rollback=DECODE_POSITIONS))
        self._open.add(text)

    def close(self, text: GreedyText) -> None:
        """Free a text's KV, unless that was done already."""
        if text in self._open:
            self._open.remove(text)
            self._engine.close(text)

    def compute(self, text: GreedyText, start: int, token_ids: Sequence[int]) -> torch.Tensor:
        """Compute a text's positions from `start` on; what it had from there is cut off. Raises EngineError.

        Where no room is left (NoRoomError), the text is closed.
        """
        count = len(token_ids)
        positions = torch.arange(start, start + count)
        hidden = self._head.embed(torch.tensor(token_ids, dtype=torch.long), positions)
        self._engine.submit(EngineStep(text, 0, (), (RowSlice(0, start, count),), hidden.cpu()))
        outputs = list[torch.Tensor]()
        while (batch := self._engine.plan()) is not None:
            output = run_in_parts(self._engine.run, batch, self._engine.give_back, _is_the_devices)
            for result in self._engine.collect(batch, output):
                if result.error is not None:
                    raise result.error
                assert result.hidden is not None
                outputs.append(result.hidden)
        if sum(map(len, outputs)) < count:
            # No page is left. Other texts' computations must not meet the rest of this one.
            self.close(text)
            raise NoRoomError("no KV is left for this text beside the others", self._engine.free_tokens)
        return torch.cat(outputs)

    def next_token(self, hidden: torch.Tensor, known: int) -> Guess:
        """The most likely token after the last block's output `[n, width]`, among the first `known` ids."""
        logits = self._head.logits(hidden[-1:])[0, :known]
        best = int(logits.argmax())
        return Guess(best, float(torch.exp(logits[best] - logits.logsumexp(0))))


class GreedyText:
    """One text, of at most `length` tokens, with its KV. Guesses are among the first `known` ids. `close` it."""

    def __init__(self, model: WholeModel, length: int, known: int) -> None:
        """Raises NoRoomError, ContextTooLongError."""
        self._model = model
        self._length = min(length, model.max_length)
        self._known = known
        # The tokens whose positions are computed, and how many of them are a text's and no guesses.
        self._computed: list[int] = []
        self._sure = 0
        model.open(self, self._length)

    def close(self) -> None:
        """Free the KV."""
        self._model.close(self)

    def behind(self, text: Sequence[int]) -> int:
        """How many of the text's tokens are not computed yet; its last one never is."""
        return len(text) - min(self._common(text), len(text) - 1)

    def read(self, text: Sequence[int], pause: Callable[[], None]) -> None:
        """Compute the text but its last token. `pause` is called before each computation; it may raise.

        Raises EngineError.
        """
        if self._fits(text) and self.behind(text) > 1:
            self._compute(text[:-1], len(text) - self.behind(text), pause)

    def guesses(self, text: Sequence[int], pause: Callable[[], None]) -> Iterator[Guess]:
        """What comes after `text`, token by token, as far as there is room; each is computed when it is asked for.

        `pause` is as for `read`. Raises EngineError.
        """
        if not self._fits(text):
            return
        hidden = self._compute(text, len(text) - self.behind(text), pause)
        while True:
            guess = self._model.next_token(hidden, self._known)
            yield guess
            end = len(self._computed)
            if end == self._length:
                return
            pause()
            hidden = self._model.compute(self, end, [guess.token])
            self._computed.append(guess.token)

    def _fits(self, text: Sequence[int]) -> bool:
        return 0 < len(text) <= self._length and 0 <= min(text) <= max(text) < self._model.vocab_size

    def _compute(self, text: Sequence[int], start: int, pause: Callable[[], None]) -> torch.Tensor:
        """Compute a text from `start` on; what the last computation gave."""
        self._sure = start
        for first in range(start, len(text), _AT_ONCE):
            pause()
            # It cuts off what is behind; and if it fails, that is gone.
            del self._computed[first:]
            part = text[first : first + _AT_ONCE]
            hidden = self._model.compute(self, first, part)
            self._computed += part
            self._sure = len(self._computed)
        return hidden

    def _common(self, text: Sequence[int]) -> int:
        """How many tokens of `text` are computed from its beginning."""
        return common_length(self._computed, text, likely=self._sure)


def _is_the_devices(error: Exception) -> bool:
    return is_out_of_memory(error) or is_device_lost(error)


def load_whole(checkpoint: Checkpoint, *, device: str = "cpu", positions: int, max_length: int) -> WholeModel:
    """Read a whole model onto a device, with KV for so many positions. Raises CheckpointError, UnsupportedModelError,
    torch.OutOfMemoryError, MemoryError.
    """
    span = Span(0, checkpoint.block_count)
    blocks = load_span(checkpoint, span, device=device, attention=register_attention())
    engine = Engine(blocks, kv_tokens=positions)
    engine.warm_up()
    return WholeModel(load_head(checkpoint, device=device), engine, max_length)
