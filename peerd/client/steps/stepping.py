"""Runs the steps of one answer: guesses tokens, sends windows of them, and takes the answers in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import trio

from peerd.client.speculation.controller import Beside
from peerd.client.speculation.speculation import MOST_DRAFTED, Speculator, Text
from peerd.client.steps.rows import Row, RowAnswer
from peerd.client.steps.windows import MOST_WINDOWS, Result, Window, Windows
from peerd.protocol.rows import Op
from peerd.trio_tools import open_tasks

if TYPE_CHECKING:
    from peerd.client.remote_head import RemoteHead
    from peerd.client.session.session import Session
    from peerd.client.token_model import TokenModel
    from peerd.protocol.messages.drawing import TokenPairs


class Stepping:
    """The steps of an answer with so many `rows`.

    most: how many of the largest logits must be right; None for all. room: how many guesses a row has room for. remote:
    how the last hop is asked to draw; None if tokens are drawn here.
    """

    def __init__(
        self,
        model: TokenModel,
        speculator: Speculator | None,
        rows: int,
        most: int | None,
        room: Callable[[Row], int],
        remote: RemoteHead | None = None,
    ) -> None:
        self._remote = remote
        self._model = model
        self._speculator = speculator
        self._is_single = rows == 1
        self._most = most
        self._room = room
        self._windows = Windows(model, remote)
        # The window whose answer was given out last, and how long it took; None after a prompt.
        self._last: tuple[Window, float] | None = None
        self._answered_at = 0.0

    @property
    def rollback(self) -> int:
        """How many positions a step may have to cut off: the guesses that can be on their way.

        The servers of a model with windows or running states keep something for each of these; then they are few.
        """
        if self._speculator is None:
            return 0
        is_free = self._is_single and not self._model.facts.limits_rollback
        return MOST_WINDOWS * (MOST_DRAFTED + 1) - 1 if is_free else MOST_DRAFTED

    def begin(self) -> None:
        """Note that another session begins, or that a prompt was computed: nothing is on its way."""
        self._windows = Windows(self._model, self._remote)
        self._last = None

    async def step(self, session: Session, live: Sequence[Row], ops: Sequence[Op]) -> list[RowAnswer]:
        """The answers for the last token of each live row, and for the guesses after it. Raises what `Session.step`
        raises.
        """
        self._windows.settle()
        if not self._windows:
            await self._send(session, live, ops)
        window, result = await self._answer(session, live[0])
        parts = await self._parts(result, [1 + len(draft) for draft in window.drafts])
        now = trio.current_time()
        self._last = window, now - max(window.began, self._answered_at)
        self._answered_at = now
        return [
            RowAnswer(row, draft, *part) for row, draft, part in zip(window.rows, window.drafts, parts, strict=True)
        ]

    async def _parts(
        self, result: Result, counts: Sequence[int]
    ) -> list[tuple[torch.Tensor | None, torch.Tensor | Sequence[TokenPairs]]]:
        """For each row the hidden states and logits of its positions, or the tokens that the last hop drew."""
        if not isinstance(result, torch.Tensor):
            return [(None, result[end - count : end]) for end, count in zip(accumulate(counts), counts, strict=True)]
        logits = await self._model.logits(result, self._most)
        return list(zip(torch.split(result, list(counts)), torch.split(logits, list(counts)), strict=True))

    def note(self, gained: int) -> None:
        """Note how many tokens the last step has gained."""
        if self._speculator is None or self._last is None:
            return
        window, seconds = self._last
        beside = Beside.NOTHING
        if not window.is_clean:
            beside = Beside.WRONG_GUESSES if window.leading is None else Beside.RIGHT_GUESSES
        self._speculator.note(len(window.rows), sum(map(len, window.drafts)), gained, seconds, beside)

    async def _send(self, session: Session, live: Sequence[Row], ops: Sequence[Op]) -> None:
        drafts: Sequence[tuple[int, ...]] = [()] * len(live)
        chance = 1.0
        if self._speculator is not None:
            drafts, chance = await self._speculator.drafts([self._text(row) for row in live])
            self._speculator.sent(sum(map(len, drafts)))
        await self._windows.send(session, live, drafts, ops, chance)

    async def _answer(self, session: Session, row: Row) -> tuple[Window, Result]:
        """Wait for the oldest window, and send others behind it meanwhile where that should pay."""
        if self._speculator is None or not self._is_single:
            return await self._windows.answer()
        while await self._follow(session, row, self._speculator.behind(self._text(row), self._windows.guessed)):
            pass
        if not self._windows.may_follow or not self._speculator.may_ask:
            return await self._windows.answer()
        async with open_tasks() as tasks:
            tasks.start_soon(self._ask_behind, session, row, self._speculator)
            return await self._windows.answer()

    async def _ask_behind(self, session: Session, row: Row, speculator: Speculator) -> None:
        """Have the draft model guess on, behind what is on its way."""
        while self._windows.may_follow:
            guessed, chance = self._windows.guessed, self._windows.chance
            if not await self._follow(session, row, await speculator.asked_behind(self._text(row), guessed, chance)):
                return

    async def _follow(self, session: Session, row: Row, found: tuple[tuple[int, ...], float]) -> bool:
        """Send a window behind the others, if there are guesses for it and it may follow."""
        guesses, chance = found
        if not guesses or not self._windows.may_follow:
            return False
        await self._windows.send_behind(session, row, guesses, chance)
        if self._speculator is not None:
            self._speculator.sent(len(guesses))
        return True

    def _text(self, row: Row) -> Text:
        return row.number, row.context, min(self._room(row), self.rollback)
