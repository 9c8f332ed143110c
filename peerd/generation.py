"""Text from a session: prompt in, tokens out, one at a time.

Knows sampling and text; knows no chain. The difficulty is text: a token may be half a character, so a
piece of text is given out only once later tokens can no longer change it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from peerd.sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from peerd.model import RemoteModel
    from peerd.session import Session

# A character of UTF-8 that is not complete yet decodes to this.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `text` is what it completes; an end-of-sequence token has none."""

    id: int
    position: int
    text: str


class Generation:
    """An answer in the making: iterate over it, once, for its tokens. Figures below grow as it runs.

    Leaving the loop early ends the session on all peers; in a long-lived task, do so under
    `contextlib.aclosing(generation.tokens())`, as for any asynchronous generator.
    """

    def __init__(self, model: RemoteModel, prompt: Sequence[int], sampling: SamplingParams) -> None:
        self.prompt = list(prompt)
        self.token_ids: list[int] = []
        self.text = ""
        self.chain: list[dict[str, object]] = []
        self.failovers = 0
        self.started: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self._model = model
        self._sampling = sampling

    def __repr__(self) -> str:
        return f"<Generation {len(self.prompt)}+{len(self.token_ids)} tokens failovers={self.failovers}>"

    @property
    def time_to_first_token_s(self) -> float | None:
        """From the first request for a token to that token."""
        if self.started is None or self.first_token is None:
            return None
        return self.first_token - self.started

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first, by the time they took. None before the second."""
        if self.first_token is None or self.last_token is None or len(self.token_ids) < 2:
            return None
        return (len(self.token_ids) - 1) / (self.last_token - self.first_token)

    def __aiter__(self) -> AsyncIterator[Token]:
        return self.tokens()

    async def tokens(self) -> AsyncGenerator[Token, None]:
        """The tokens, as they come. Raises NoChain, Overloaded, ContextTooLong, InvalidRequest."""
        if self.started is not None:
            raise RuntimeError("a generation is iterated over once; call generate() for another answer")
        self.started = trio.current_time()
        sampling = self._sampling
        session = await self._model.start_session(max_length=len(self.prompt) + sampling.max_new_tokens)
        try:
            text = _TextStream(self._model)
            sampler = Sampler(sampling)
            new = self.prompt
            for _ in range(sampling.max_new_tokens):
                token_id = await self._next(session, sampler, new)
                self._note(session, token_id)
                final = token_id in sampling.eos_token_ids or len(self.token_ids) == sampling.max_new_tokens
                piece = text.add(token_id, final=final)
                self.text += piece
                yield Token(token_id, len(self.prompt) + len(self.token_ids) - 1, piece)
                if final:
                    return
                new = [token_id]
        finally:
            session.close()

    async def _next(self, session: Session, sampler: Sampler, new: Sequence[int]) -> int:
        context = self.prompt + self.token_ids
        hidden = await session.step(self._model.embed(new, len(context) - len(new)))
        logits = await self._model.logits(hidden)
        return sampler.pick(logits[-1], context, row=0, position=len(context))

    def _note(self, session: Session, token_id: int) -> None:
        self.last_token = trio.current_time()
        if self.first_token is None:
            self.first_token = self.last_token
        self.token_ids.append(token_id)
        self.chain = session.chain
        self.failovers = session.failovers


class _TextStream:
    """Turns token ids into text that never has to be taken back.

    A tokenizer joins tokens (spaces, bytes of one character), so each new text is decoded with the piece
    before it as context, and that piece's own text is then left off.
    """

    def __init__(self, model: RemoteModel) -> None:
        self._decode = model.decode
        self._ids: list[int] = []
        self._context = 0
        self._given = 0

    def add(self, token_id: int, *, final: bool) -> str:
        """The text that became certain with this token; all that is left with the `final` one."""
        self._ids.append(token_id)
        known = self._decode(self._ids[self._context : self._given])
        text = self._decode(self._ids[self._context :])
        if text.endswith(_INCOMPLETE) and not final:
            return ""
        self._context, self._given = self._given, len(self._ids)
        return text[len(known) :]
