"""What `chaos` asks of a swarm, and whether the answers are those of local Transformers.

Knows generations and what is promised of them (DESIGN.md, "What is promised"); knows no processes. The difficulty is
judging afterwards and honestly: a token that rounding may choose otherwise must not be held against the swarm, nor
must it excuse what follows. So every token is compared with what the reference says after the very same tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
import trio

from peerd.client.decoding import Decoding
from peerd.client.model import SwarmModel
from peerd.client.sampling import Sampler, SamplingParams, draw
from peerd.protocol.errors import PeerdError

# Where the reference's two best logits are closer than this, rounding may decide; and where a draw is so close to
# where one token's share ends and the next one's begins.
DECISIVE_MARGIN = 1e-3
PROMPT_TOKENS = (16, 64)
ANSWER_TOKENS = (48, 144)


@dataclass(frozen=True)
class Counts:
    """Of one session: failovers, those of them that kept no hop, and positions sent again."""

    failovers: int = 0
    reopened: int = 0
    replayed: int = 0


@dataclass(eq=False)
class Answer:
    """One generation: `times[i]` is when `token_ids[i]` came. Sampled if its temperature is not 0."""

    prompt: list[int]
    params: SamplingParams
    started: float
    decoding: Decoding
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    ended: float | None = None
    error: PeerdError | None = None
    # What the session had counted when each token came.
    counts: list[Counts] = field(default_factory=list)

    @property
    def peers(self) -> list[str]:
        """Who is in its chain now."""
        session = self.decoding.session
        return [hop.peer for hop in session.chain] if session is not None and self.ended is None else []

    @property
    def held(self) -> int:
        """Positions that every hop of its chain has cached now: all that was answered."""
        return len(self.prompt) + len(self.token_ids) - 1 if self.token_ids else 0

    @property
    def gaps_s(self) -> list[float]:
        """From each token to the next."""
        return [until - since for since, until in itertools.pairwise(self.times)]

    @property
    def total(self) -> Counts:
        """What its session has counted by now."""
        session = self.decoding.session
        if session is None:
            return Counts()
        return Counts(session.failovers, session.reopened, session.replayed_positions)

    def come(self, token_id: int) -> None:
        """A token came now."""
        self.token_ids.append(token_id)
        self.times.append(trio.current_time())
        self.counts.append(self.total)


class Asker:
    """One session after the other, without pause: greedy and sampled in turn, prompts and lengths at random."""

    def __init__(self, model: SwarmModel, text: Sequence[int], number: int, seed: int) -> None:
        self.answers: list[Answer] = []
        self._model = model
        self._text = text
        self._random = Random(f"{seed} {number}")
        self._sampled = number % 2 == 1

    @property
    def now(self) -> Answer | None:
        """What is being answered."""
        return self.answers[-1] if self.answers and self.answers[-1].ended is None else None

    async def ask_until(self, stop: trio.Event, limit: int | None = None) -> None:
        """Ask until `stop`, then finish the last answer. `limit`: answers of at most so many tokens."""
        while not stop.is_set():
            answer = self._next(limit)
            self.answers.append(answer)
            try:
                await self._run(answer)
            except PeerdError as error:
                answer.error = error
                # Whoever is told that it cannot work tries again, but not without a pause.
                await trio.sleep(1)
            finally:
                answer.ended = trio.current_time()

    def _next(self, limit: int | None) -> Answer:
        count = self._random.randint(*PROMPT_TOKENS)
        start = self._random.randrange(len(self._text) - count)
        prompt = list(self._text[start : start + count])
        self._sampled = not self._sampled
        # No filters: then the one place where rounding may decide is where two tokens' shares meet.
        sampling: dict[str, Any] = {"temperature": 0.8, "seed": self._random.getrandbits(32)} if self._sampled else {}
        tokens = self._random.randint(*ANSWER_TOKENS)
        params = SamplingParams(max_new_tokens=min(tokens, limit or tokens), **sampling)
        return Answer(prompt, params, trio.current_time(), Decoding(self._model, prompt, params))

    async def _run(self, answer: Answer) -> None:
        tokens = answer.decoding.tokens()
        try:
            async for picked in tokens:
                answer.come(picked.id)
        finally:
            await tokens.aclose()


@dataclass
class Verdict:
    """How answers compare with the reference."""

    tokens: int = 0
    sampled: int = 0
    # Other than the reference's, where rounding may decide.
    near_ties: int = 0
    wrong: list[str] = field(default_factory=list)


class Reference:
    """Transformers on the same weights in fp32."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        where: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
        folder = path.parent if path.is_file() else path
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()

    def judge(self, answers: Sequence[Answer]) -> Verdict:
        """Compare every token with what the reference says after those before it. Takes its time."""
        verdict = Verdict()
        for answer in answers:
            self._judge(answer, verdict)
        return verdict

    @torch.inference_mode()
    def next_token(self, answer: Answer) -> int:
        """The token that continues an answer."""
        row = answer.prompt + answer.token_ids
        logits = self._model(torch.tensor([row])).logits[0, -1].float()
        return Sampler(answer.params).pick(logits, (), row=0, position=len(row))

    @torch.inference_mode()
    def _judge(self, answer: Answer, verdict: Verdict) -> None:
        if answer.error is None and len(answer.token_ids) != answer.params.max_new_tokens:
            verdict.wrong.append(f"{len(answer.token_ids)} tokens of {answer.params.max_new_tokens}")
        if not answer.token_ids:
            return
        row = answer.prompt + answer.token_ids
        first = len(answer.prompt)
        logits = self._model(torch.tensor([row[:-1]])).logits[0, first - 1 :].float()
        for index, token in enumerate(answer.token_ids):
            expected, acceptable = _promised(answer.params, logits[index], first + index, token)
            verdict.tokens += 1
            verdict.sampled += answer.params.temperature != 0
            if token != expected and acceptable:
                verdict.near_ties += 1
            elif token != expected:
                verdict.wrong.append(f"token {index} of an answer to {first} is {token}, not {expected}: {row}")
                return


def _promised(params: SamplingParams, logits: torch.Tensor, position: int, token: int) -> tuple[int, bool]:
    """The reference's token, and whether rounding alone may have made it `token`."""
    sampler = Sampler(params)
    expected = sampler.pick(logits, (), row=0, position=position)
    if params.temperature == 0:
        return expected, float(logits[expected] - logits[token]) <= DECISIVE_MARGIN
    shares = sampler.scores(logits, ()).double().softmax(-1)
    end = float(shares[: token + 1].sum())
    place = draw(params.seed, 0, position)
    return expected, end - float(shares[token]) - DECISIVE_MARGIN <= place <= end + DECISIVE_MARGIN
