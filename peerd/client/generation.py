"""One answer as an application iterates over it, with its figures. The loop itself is in `decoding.py`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from peerd.client.decoding import Decoding
from peerd.client.finding.served_by import ServedBy
from peerd.client.sampling import SamplingParams
from peerd.client.speculation.speculation import Speculation
from peerd.client.token_model import TokenModel
from peerd.protocol.errors import NoChain, Overloaded

if TYPE_CHECKING:
    from peerd.client.blocks import Adapter
    from peerd.client.session.session import Session


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `text` is the text that it completes; an end-of-sequence token completes none."""

    id: int
    position: int
    text: str


class Generation:
    """An answer while it is generated: iterate over it once for its tokens. Its figures grow meanwhile.

    Leaving the loop early ends the session on all peers. In a long-lived task, do so under
    `contextlib.aclosing(generation.tokens())`, as for any asynchronous generator. After NoChain or Overloaded, iterate
    over it again: it continues where it stopped, and for five minutes it uses the KV that live servers still hold.
    """

    def __init__(
        self,
        model: TokenModel,
        prompt: Sequence[int],
        sampling: SamplingParams,
        adapter: Adapter | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.prompt = list(prompt)
        self.token_ids: list[int] = []
        self.text = ""
        self.chain: tuple[ServedBy, ...] = ()
        self.failovers = 0
        self.started: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self._decoding = Decoding(
            model, self.prompt, sampling, adapter=adapter, resumable=True, speculation=speculation
        )
        # Whether it may be iterated over: it was not, or it stopped before its end.
        self._waits = True

    def __repr__(self) -> str:
        return f"<Generation {len(self.prompt)}+{len(self.token_ids)} tokens failovers={self.failovers}>"

    @property
    def time_to_first_token_s(self) -> float | None:
        """Seconds from the first request for a token to that token."""
        if self.started is None or self.first_token is None:
            return None
        return self.first_token - self.started

    @property
    def drafted(self) -> int:
        """How many guessed tokens were sent along with steps."""
        return 0 if self._decoding.speculator is None else self._decoding.speculator.drafted

    @property
    def accepted(self) -> int:
        """How many of those guesses were right: tokens that needed no step of their own."""
        return 0 if self._decoding.speculator is None else self._decoding.speculator.accepted

    @property
    def tokens_per_second(self) -> float | None:
        """The number of tokens after the first, divided by their time in seconds. None before the second token."""
        if self.first_token is None or self.last_token is None or len(self.token_ids) < 2:
            return None
        return (len(self.token_ids) - 1) / (self.last_token - self.first_token)

    def __aiter__(self) -> AsyncIterator[Token]:
        return self.tokens()

    async def tokens(self) -> AsyncGenerator[Token, None]:
        """The tokens, as they come. Raises NoChain, Overloaded, ContextTooLong, InvalidRequest."""
        if not self._waits:
            raise RuntimeError("a generation is iterated over once; call generate() for another answer")
        self._waits = False
        if self.started is None:
            self.started = trio.current_time()
        try:
            async with aclosing(self._decoding.tokens()) as tokens:
                async for picked in tokens:
                    assert self._decoding.session is not None
                    self._note(self._decoding.session, picked.id)
                    self.text += picked.text
                    yield Token(picked.id, picked.position, picked.text)
        except (NoChain, Overloaded):
            self._waits = True
            raise

    def _note(self, session: Session, token_id: int) -> None:
        self.last_token = trio.current_time()
        if self.first_token is None:
            self.first_token = self.last_token
        self.token_ids.append(token_id)
        self.chain = session.chain
        self.failovers = session.failovers
