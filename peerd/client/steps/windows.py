"""The steps of one answer that are on their way.

Usually there is one: the last token of each row, with guesses after it. Behind it others may follow that consist of
guesses only. They count if all guesses before them turn out to be right, and are given up otherwise: their answers are
thrown away when they come, and the start of the next step cuts off what they computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import trio

from peerd.client.steps.rows import Row
from peerd.protocol.rows import Op, RowSlice

if TYPE_CHECKING:
    from peerd.client.remote_head import RemoteHead
    from peerd.client.session.session import Sent, Session
    from peerd.client.token_model import TokenModel
    from peerd.protocol.messages.drawing import TokenPairs

#: How many windows may be on their way: a session may have four steps without an answer, and one of them must be free
#: for the step that follows a wrong guess.
MOST_WINDOWS = 3


Result = torch.Tensor | tuple["TokenPairs", ...]
"""What the last block gave out for each position of a window, `[positions, width]`; or the tokens that were drawn."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A step that is on its way.

    drafts: for each row, the guesses after the step's first token. leading: that token, if it is itself a guess.
    chance: the probability that all its guesses are right, and all before them. is_clean: nothing else of this answer
    was on its way when it was sent, so the time that it takes is its own.
    """

    rows: tuple[Row, ...]
    start: int
    drafts: tuple[tuple[int, ...], ...]
    sent: Sent
    began: float
    chance: float = 1.0
    leading: int | None = None
    is_clean: bool = True


class Windows:
    """The windows of one answer, in order."""

    def __init__(self, model: TokenModel, remote: RemoteHead | None = None) -> None:
        """`remote`: how the last hop is asked to draw; None if tokens are drawn here."""
        self._model = model
        self._remote = remote
        self._windows: deque[Window] = deque()
        self._given_up: list[Sent] = []

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def guessed(self) -> tuple[int, ...]:
        """All guesses that are on their way for the only row, in order."""
        return tuple(
            token
            for window in self._windows
            for token in (*(() if window.leading is None else (window.leading,)), *window.drafts[0])
        )

    @property
    def chance(self) -> float:
        """The probability that all guesses on their way are right."""
        return self._windows[-1].chance if self._windows else 1.0

    @property
    def may_follow(self) -> bool:
        """Whether another window may start behind these."""
        return 0 < len(self._windows) + len(self._unanswered) < MOST_WINDOWS

    @property
    def _unanswered(self) -> list[Sent]:
        self._given_up = [sent for sent in self._given_up if not sent.is_done]
        return self._given_up

    async def send(
        self,
        session: Session,
        rows: Sequence[Row],
        drafts: Sequence[tuple[int, ...]],
        ops: Sequence[Op],
        chance: float,
    ) -> None:
        """Send the last token of each row and the guesses after it. Raises what `Session.submit` raises."""
        is_clean, began = not self._windows and not self._unanswered, trio.current_time()
        inputs, slices = [], []
        for row, draft in zip(rows, drafts, strict=True):
            start = len(row.context) - 1
            inputs.append(self._model.embed((row.context[-1], *draft), start))
            slices.append(RowSlice(row.number, start, 1 + len(draft)))
        contexts = {row.number: [*row.context, *draft] for row, draft in zip(rows, drafts, strict=True)}
        request = None if self._remote is None else self._remote.request(contexts)
        sent = await session.submit(torch.cat(inputs), rows=slices, ops=ops, want="all", draw=request)
        start = len(rows[0].context) - 1
        self._windows.append(Window(tuple(rows), start, tuple(drafts), sent, began, chance, is_clean=is_clean))

    async def send_behind(self, session: Session, row: Row, guesses: Sequence[int], chance: float) -> None:
        """Send guesses that follow those on their way. Raises what `Session.submit` raises."""
        start, began = len(row.context) + len(self.guessed), trio.current_time()
        piece = RowSlice(row.number, start, len(guesses))
        contexts = {row.number: [*row.context, *self.guessed, *guesses]}
        request = None if self._remote is None else self._remote.request(contexts)
        sent = await session.submit(self._model.embed(guesses, start), rows=[piece], want="all", draw=request)
        leading, *draft = guesses
        self._windows.append(Window((row,), start, (tuple(draft),), sent, began, chance, leading, is_clean=False))

    async def answer(self) -> tuple[Window, Result]:
        """Wait for the answer to the oldest window. Raises what `Session.step` raises; then all are gone."""
        window = self._windows[0]
        try:
            result = await window.sent.drawn_or_result()
        except BaseException:
            self._windows.clear()
            raise
        self._windows.popleft()
        return window, result

    def settle(self) -> None:
        """Give up the windows that do not follow from the text as it now is."""
        if not self._windows:
            return
        following = self._windows[0]
        [row] = following.rows
        is_right = following.start == len(row.context) - 1 and following.leading == row.context[-1]
        if row.finished or not is_right:
            self._given_up += [window.sent for window in self._windows]
            self._windows.clear()
