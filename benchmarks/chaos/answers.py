"""The sessions of `chaos`, and the comparison of their answers with local Transformers.

DESIGN.md, "What is promised", defines what an answer must be. Each token is compared with what the reference gives
after the answer's own earlier tokens. So a token that rounding may change is not counted as wrong, and does not excuse
the tokens after it either.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import trio

from peerd.client.decoding import Decoding
from peerd.client.model import SwarmModel
from peerd.client.sampling import SamplingParams
from peerd.client.speculation.controller import Controller
from peerd.client.speculation.drafts import Draft
from peerd.client.speculation.speculation import Speculation
from peerd.exchange.sampler import Sampler, draw
from peerd.protocol.errors import PeerdError

# If the reference's two best logits are closer than this, rounding may decide between them. The same holds for a draw
# that is this close to the border between two tokens' shares.
DECISIVE_MARGIN = 1e-3
PROMPT_TOKENS = (16, 64)
ANSWER_TOKENS = (48, 144)
# Guesses of a window. A whole one would mostly be wrong, and slow its neighbours down.
_EAGER_GUESSES = 5


@dataclass(frozen=True)
class Counts:
    """A session's failovers, the failovers that kept no hop, and the positions that were sent again."""

    failovers: int = 0
    reopened: int = 0
    replayed: int = 0


@dataclass(eq=False)
class Answer:
    """One generation: `times[i]` is when `token_ids[i]` came. It is sampled if its temperature is not 0."""

    prompt: list[int]
    params: SamplingParams
    started: float
    decoding: Decoding
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    ended: float | None = None
    error: PeerdError | None = None
    # The session's counts at each token.
    counts: list[Counts] = field(default_factory=list)

    @property
    def peers(self) -> list[str]:
        """The peers in its chain now."""
        session = self.decoding.session
        return [hop.peer for hop in session.chain] if session is not None and self.ended is None else []

    @property
    def guesses(self) -> tuple[int, int]:
        """How many guesses were sent, and how many of them were right."""
        told = self.decoding.speculator
        return (0, 0) if told is None else (told.drafted, told.accepted)

    @property
    def held(self) -> int:
        """The positions that every hop of its chain has cached now: all but the last token."""
        return len(self.prompt) + len(self.token_ids) - 1 if self.token_ids else 0

    @property
    def gaps_s(self) -> list[float]:
        """The seconds from each token to the next."""
        return [until - since for since, until in itertools.pairwise(self.times)]

    @property
    def total(self) -> Counts:
        """What its session has counted so far."""
        session = self.decoding.session
        if session is None:
            return Counts()
        return Counts(session.failovers, session.reopened, session.replayed_positions)

    def come(self, token_id: int) -> None:
        """Note a token that came now."""
        self.token_ids.append(token_id)
        self.times.append(trio.current_time())
        self.counts.append(self.total)


class Memory:
    """Guesses that an answer will be the one that there was before, and errs at every fourth position or so."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text = text

    def propose(self, text: Sequence[int], count: int) -> Draft:
        """As every `Drafter`."""
        ahead = range(len(text), min(len(text) + count, len(self._text)))
        return Draft(tuple(self._text[at if Random(at).random() > 0.25 else at - 1] for at in ahead))


class Eager(Controller):
    """Sends guesses with every step and behind every step, whatever that costs."""

    def choose(self, chances: Sequence[Sequence[float]]) -> list[int]:
        """As many as fit into a short step."""
        return [min(len(row), _EAGER_GUESSES) for row in chances]

    def behind(self, chances: Sequence[float]) -> int:
        """As many again."""
        return min(len(chances), _EAGER_GUESSES)


class Asker:
    """Asks in one session after another without pause: greedy and sampled in turn, prompts and lengths at random.

    Every second pair of askers asks everything twice, and guesses tokens the second time, so that peers die beneath
    windows that are on their way.
    """

    def __init__(self, model: SwarmModel, text: Sequence[int], number: int, seed: int) -> None:
        self.answers: list[Answer] = []
        self._model = model
        self._text = text
        self._random = Random(f"{seed} {number}")
        self._sampled = number % 2 == 1
        self._asks_twice = number % 4 >= 2

    @property
    def now(self) -> Answer | None:
        """The answer in progress."""
        return self.answers[-1] if self.answers and self.answers[-1].ended is None else None

    async def ask_until(self, stop: trio.Event, limit: int | None = None) -> None:
        """Ask until `stop`, then finish the last answer. `limit`: the most tokens of an answer."""
        while not stop.is_set():
            answer = self._next(limit)
            self.answers.append(answer)
            try:
                await self._run(answer)
            except PeerdError as error:
                answer.error = error
                # After an error the asker tries again, but not without a pause.
                await trio.sleep(1)
            finally:
                answer.ended = trio.current_time()

    def _next(self, limit: int | None) -> Answer:
        last = self.answers[-1] if self.answers else None
        if self._asks_twice and last is not None and last.error is None and last.decoding.speculator is None:
            return self._again(last)
        count = self._random.randint(*PROMPT_TOKENS)
        start = self._random.randrange(len(self._text) - count)
        prompt = list(self._text[start : start + count])
        self._sampled = not self._sampled
        # Without filters, rounding can only decide where two tokens' shares meet.
        sampling: dict[str, Any] = {"temperature": 0.8, "seed": self._random.getrandbits(32)} if self._sampled else {}
        tokens = self._random.randint(*ANSWER_TOKENS)
        params = SamplingParams(max_new_tokens=min(tokens, limit or tokens), **sampling)
        return Answer(prompt, params, trio.current_time(), Decoding(self._model, prompt, params))

    def _again(self, last: Answer) -> Answer:
        """The same question once more, with guesses."""
        speculation = Speculation(partial(Memory, [*last.prompt, *last.token_ids]), controller=Eager)
        decoding = Decoding(self._model, last.prompt, last.params, speculation=speculation)
        return Answer(last.prompt, last.params, trio.current_time(), decoding)

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
    # Tokens that differ from the reference's where rounding may decide.
    near_ties: int = 0
    wrong: list[str] = field(default_factory=list)


class Reference:
    """Transformers on the same weights in fp32."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        quiet: Any = logging
        quiet.disable_progress_bar()
        where: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
        folder = path.parent if path.is_file() else path
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
        self._model: Any = model.eval()

    def judge(self, answers: Sequence[Answer]) -> Verdict:
        """Compare every token with the reference's token after the tokens before it. Slow."""
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
    """Return the reference's token, and whether rounding alone may explain `token`."""
    sampler = Sampler(params)
    expected = sampler.pick(logits, (), row=0, position=position)
    if params.temperature == 0:
        return expected, float(logits[expected] - logits[token]) <= DECISIVE_MARGIN
    shares = sampler.scores(logits, ()).double().softmax(-1)
    end = float(shares[: token + 1].sum())
    place = draw(params.seed, 0, position)
    return expected, end - float(shares[token]) - DECISIVE_MARGIN <= place <= end + DECISIVE_MARGIN
