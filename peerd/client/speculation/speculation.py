"""Speculative decoding for the answers of one model: what is guessed, what is sent, and what is learnt from it.

A step carries the last token of a row and some guesses after it. The blocks compute all positions in one traversal of
the chain. The token that the sampler draws after each position shows whether the next guess was right. The first wrong
guess and all after it are cut off by the start of the next step (Leviathan et al., arXiv 2211.17192, with draws that
depend on seed, row and position only). So the tokens are those of plain decoding, whatever is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

import trio

from peerd.client.speculation.acceptance import Acceptance, Watch
from peerd.client.speculation.ahead import CONFIDENT, AheadTimes
from peerd.client.speculation.confidence import Ask
from peerd.client.speculation.controller import Beside, Controller
from peerd.client.speculation.draft_times import DraftTimes
from peerd.client.speculation.drafts import CostlyDrafter, Draft, Drafter
from peerd.client.speculation.ngram import NgramDrafter
from peerd.client.speculation.step_times import MOST_DRAFTED, StepTimes

if TYPE_CHECKING:
    import torch

__all__ = ["MOST_DRAFTED", "Speculation", "Speculator"]

#: Answers with more rows are not guessed: their steps have enough positions, and each row costs a drafter.
MOST_ROWS: Final = 8

Text = tuple[int, Sequence[int], int]
"""A row, all its tokens, and how many guesses it has room for."""


class DraftSource(Protocol):
    """A draft model or a draft head, which several answers share."""

    @property
    def times(self) -> DraftTimes:
        """How long it takes for a token."""

    def drafter(self, prompt: Sequence[int], length: int) -> CostlyDrafter:
        """Its drafter for an answer that begins with `prompt`, and has at most `length` tokens with it."""


class Speculation:
    """What the answers of one model in this process share: measured times, and how often guesses were right.

    rows_now: how many rows are decoded now. The sessions of other processes are not known here.
    """

    def __init__(
        self,
        drafter: Callable[[], Drafter] = NgramDrafter,
        model: DraftSource | None = None,
        controller: type[Controller] = Controller,
    ) -> None:
        """`drafter` makes one for each row of an answer. `model` guesses too, for answers of one row. `controller`
        decides for each answer what is sent.
        """
        self.drafter = drafter
        self.controller = controller
        self.model = model
        self.times = StepTimes()
        self.ahead = AheadTimes()
        self.acceptance = Acceptance()
        self.rows_now = 0

    def answer(self, rows: int) -> Speculator | None:
        """A speculator for one answer of so many rows. None if they are too many to gain by guesses."""
        return Speculator(self, rows) if rows <= MOST_ROWS else None


class Speculator:
    """Guesses for the rows of one answer.

    drafted, accepted: how many guesses were sent, and how many of them were right.
    """

    def __init__(self, shared: Speculation, rows: int) -> None:
        self.drafted = 0
        self.accepted = 0
        self._shared = shared
        self._rows = rows
        self._controller = shared.controller(shared.times, lambda: shared.rows_now - self._rows, shared.ahead)
        self._acceptance = Acceptance(shared.acceptance)
        self._drafters = [shared.drafter() for _ in range(rows)]
        self._watches = [Watch(self._acceptance) for _ in range(rows)]
        self._costly: CostlyDrafter | None = None
        self._times = DraftTimes() if shared.model is None else shared.model.times
        # How long the draft model was asked before the step that runs.
        self._asking_s = 0.0

    @contextmanager
    def decoding(self, prompt: Sequence[int], length: int) -> Iterator[None]:
        """While this answer is decoded, others of the same model count its rows that have not ended.

        With `prompt`, it has at most `length` tokens.
        """
        self._shared.rows_now += self._rows
        if self._shared.model is not None and len(self._drafters) == 1:
            self._costly = self._shared.model.drafter(prompt, length)
        try:
            yield
        finally:
            self._shared.rows_now -= self._rows
            if self._costly is not None:
                self._costly.end()
                self._costly = None

    def ended(self) -> None:
        """Note that a row has ended, while others go on."""
        self._rows -= 1
        self._shared.rows_now -= 1

    async def drafts(self, texts: Sequence[Text]) -> tuple[list[tuple[int, ...]], float]:
        """The guesses to send for each of `texts`, and how likely all those of the first one are right."""
        self._asking_s = 0.0
        drafts = [self._drafters[row].propose(text, _most(room)) for row, text, room in texts]
        # Guesses are followed whether they are sent or not.
        for (row, text, _), draft in zip(texts, drafts, strict=True):
            self._watches[row].proposed(draft, len(text))
        if self._costly is not None and self._costly.ready:
            drafts = [await self._better(self._costly, drafts[0], texts[0])]
        likely = [self._acceptance.likely(draft) for draft in drafts]
        chosen = self._controller.choose(likely)
        chance = likely[0][chosen[0] - 1] if chosen[0] else 1.0
        return [draft.tokens[:count] for draft, count in zip(drafts, chosen, strict=True)], chance

    @property
    def may_ask(self) -> bool:
        """Whether there is a draft model that could guess behind what is on its way."""
        return self._costly is not None and self._costly.ready

    def behind(self, text: Text, guessed: tuple[int, ...]) -> tuple[tuple[int, ...], float]:
        """Guesses from the text itself to send behind those on their way, and how likely all are right; they may be
        none.
        """
        row, tokens, room = text
        count = len(guessed)
        draft = self._drafters[row].propose(tokens, min(room, count + 1 + MOST_DRAFTED))
        if draft.tokens[:count] != guessed:
            return (), 0.0
        likely = self._acceptance.likely(draft)[count:]
        sent = self._controller.behind(likely)
        return draft.tokens[count : count + sent], likely[sent - 1] if sent else 0.0

    async def asked_behind(self, text: Text, guessed: tuple[int, ...], chance: float) -> tuple[tuple[int, ...], float]:
        """As `behind`, of the draft model, which guesses while the servers compute. chance: that `guessed` is right."""
        _, tokens, room = text
        if self._costly is None or not self.may_ask or chance < CONFIDENT:
            return (), 0.0
        asking = self._controller.ask((), self._acceptance.of_model, 0.0, min(room - len(guessed) - 1, MOST_DRAFTED))
        if asking is None:
            return (), 0.0
        ask = Ask(asking.count + 1, asking.least, self._acceptance.by_grade)
        draft = await self._costly.propose([*tokens, *guessed], ask)
        likely = [chance * share for share in self._acceptance.likely(draft)]
        sent = self._controller.behind(likely)
        return draft.tokens[:sent], likely[sent - 1] if sent else 0.0

    async def _better(self, costly: CostlyDrafter, free: Draft, text: Text) -> Draft:
        """The free draft, or the draft model's if that is worth more. It is asked only where that may be."""
        row, tokens, room = text
        acceptance, times = self._acceptance, self._times
        chances = acceptance.likely(free)
        if times.token_s is None:
            return free
        asking = self._controller.ask(chances, acceptance.of_model, times.token_s, _most(room))
        if asking is None:
            return free
        began = trio.current_time()
        draft = await costly.propose(tokens, Ask(asking.count, asking.least, acceptance.by_grade))
        self._asking_s = trio.current_time() - began
        if not draft.tokens:
            return free
        times.note(len(draft), self._asking_s - costly.reading_s)
        self._watches[row].proposed(draft, len(tokens))
        rate = self._controller.rate
        return draft if rate(acceptance.likely(draft)) > rate(chances) or not free.tokens else free

    def computed(self, start: int, hidden: torch.Tensor) -> None:
        """Take what the last block gave out, `[n, width]`, for positions of the only row from `start` on."""
        if self._costly is not None:
            self._costly.computed(start, hidden)

    def came(self, row: int, token: int, position: int) -> None:
        """Note a token that was drawn."""
        self._watches[row].came(token, position)

    def sent(self, guesses: int) -> None:
        """Note that so many guesses were sent."""
        self.drafted += guesses

    def note(self, rows: int, drafted: int, gained: int, seconds: float, beside: Beside = Beside.NOTHING) -> None:
        """A step of so many rows, with so many guesses after their first tokens, took `seconds` and gained so many
        tokens. The time in `drafts` is not part of it. beside: what else was on its way when it was sent.
        """
        self.accepted += gained - rows if drafted else 0
        # The first token of a window behind others is a guess as well.
        self.accepted += beside is Beside.RIGHT_GUESSES
        self._controller.note(rows, drafted, gained, seconds, self._asking_s, beside)
        self._asking_s = 0.0


def _most(room: int) -> int:
    return max(0, min(room, MOST_DRAFTED))
