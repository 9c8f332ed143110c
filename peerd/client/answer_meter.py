"""Times the tokens of one answer, as its caller takes them, and counts how answers end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TYPE_CHECKING

import trio

from peerd.client.prompt_watch import watching_prompt
from peerd.meters import AnswerTrace, Meters
from peerd.protocol.errors import CallerError, NoChain, Overloaded, PeerdError

if TYPE_CHECKING:
    from peerd.client.finding.served_by import ServedBy
    from peerd.client.session.session import Session
    from peerd.client.speculation.speculation import Speculator


class AnswerMeter:
    """Of one decoding, with any number of rows."""

    def __init__(self, meters: Meters, speculator: Speculator | None) -> None:
        self._meters = meters
        self._speculator = speculator
        self._counted = (0, 0)
        self._began = 0.0
        self._tokens = 0
        self._trace: AnswerTrace | None = None
        # When each row's last token came.
        self._last: dict[int, float] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the tokens come. It may run again if the answer goes on after an error."""
        self._began, end = trio.current_time(), "abandoned"
        self._last.clear()
        self._tokens = 0
        self._trace = self._meters.traces.begin() if self._meters.traces is not None else None
        try:
            yield
            end = "complete"
        except PeerdError as error:
            end = _end_of(error)
            raise
        finally:
            self._meters.answers[end] += 1
            if self._trace is not None:
                self._trace.end(end, self._tokens)
            self._count_guesses()

    def watching_prompt(self, session: Session) -> AbstractAsyncContextManager[None]:
        """While the block computes a prompt in this session, find out how long each hop takes, if anybody wants to
        know.
        """
        return watching_prompt(session, self._trace)

    def prompt(self, tokens: int, cached: int) -> None:
        """Note a prompt, of which an earlier session has computed `cached` tokens."""
        self._meters.prompt_tokens += tokens
        self._meters.cached_tokens += cached

    def chain(self, served_by: Callable[[], Sequence[ServedBy]]) -> None:
        """Note which peers compute the answer now, if anybody wants to know."""
        if self._trace is not None:
            self._trace.serving([(str(hop.peer), str(hop.span)) for hop in served_by()])

    def token(self, row: int) -> None:
        """Note one token of a row."""
        now, meters = trio.current_time(), self._meters
        meters.tokens += 1
        self._tokens += 1
        if not self._last:
            meters.first_token_s.observe(now - self._began)
        elif row in self._last:
            meters.between_tokens_s.observe(now - self._last[row])
        self._last[row] = now

    def _count_guesses(self) -> None:
        if self._speculator is not None:
            drafted, accepted = self._counted
            self._counted = self._speculator.drafted, self._speculator.accepted
            self._meters.drafted += self._counted[0] - drafted
            self._meters.accepted += self._counted[1] - accepted


def _end_of(error: PeerdError) -> str:
    """How an answer ended that an error ended, in a few words that are always the same."""
    if isinstance(error, NoChain):
        return "no_chain"
    if isinstance(error, Overloaded):
        return "overloaded"
    return "refused" if isinstance(error, CallerError) else "failed"
