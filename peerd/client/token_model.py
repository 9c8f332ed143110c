"""What decoding needs of a model, so that it does not depend on the model that starts it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

    from peerd.client.blocks import Adapter
    from peerd.client.finding.finder import Patience
    from peerd.client.grammars.grammar import Grammar
    from peerd.client.grammars.vocabulary import CompiledGrammar
    from peerd.client.picked import TokenLogprobs
    from peerd.client.session.kept_sessions import AnswerSession
    from peerd.client.session.session import Session
    from peerd.meters import Meters

T = TypeVar("T")


class Facts(Protocol):
    """What decoding needs of `ModelFacts`, which says what its fields mean."""

    @property
    def ropes_change_at(self) -> int | None: ...

    @property
    def limits_rollback(self) -> bool: ...


class TokenModel(Protocol):
    """What decoding needs of a `SwarmModel`: token ids to hidden states, sessions, hidden states to logits and text."""

    @property
    def facts(self) -> Facts:
        """What is known about the model."""

    @property
    def remote_vocab(self) -> int | None:
        """How many token ids there are, if last hops are to draw tokens where they can; else None."""

    @property
    def meters(self) -> Meters:
        """What the peer counts and times."""

    async def start_answer(
        self,
        prompt: Sequence[int],
        *,
        max_length: int,
        max_rows: int = 1,
        max_rollback: int = 0,
        prompt_length: int = 0,
        adapter: Adapter | None = None,
        patience: Patience | None = None,
        head: bool = False,
    ) -> AnswerSession:
        """A session for an answer: one that has the beginning of the prompt, or a new one. `head`: whether its last hop
        draws the tokens, where it offers that.
        """

    def end_answer(self, answer: AnswerSession, ids: Sequence[int]) -> None:
        """Keep the session for another answer, or close it. `ids`: what its row has computed; none if it failed."""

    def close_later(self, session: Session) -> None:
        """Close the session later, unless it is used again before."""

    def embed(self, token_ids: Sequence[int], start: int = 0) -> torch.Tensor:
        """Turn token ids into the first block's input, `[n, width]`."""

    async def logits(self, hidden: torch.Tensor, most: int | None = None) -> torch.Tensor:
        """Turn the last block's output, `[n, width]`, into float32 logits, `[n, vocabulary]`."""

    async def score(self, hidden: torch.Tensor, token_ids: Sequence[int], top: int) -> list[TokenLogprobs]:
        """The log-probability of each token after the last block's output before it, `[n, width]`."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn token ids into text."""

    async def compiled(self, grammar: Grammar) -> CompiledGrammar:
        """Prepare a grammar for an answer. Raises InvalidRequest."""

    async def in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function that computes for long in a worker thread."""
