"""Speculation over simulated chains: the real decoding loop and controller, with measured server times.

Three tables. Guesses of known quality, beside the bound of Leviathan et al. (arXiv 2211.17192); texts that the
demonstration's model has written (`speculation_texts.json`), with guesses from the text itself and of a head; and the
same texts with many sessions at once, which share the servers. `verbatim` is the text that the model was asked to copy,
word for word, as a larger model would have answered.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import trio
from trio.testing import MockClock

from benchmarks.simulated.speculation_chain import SimulatedChain, SimulatedSession, bound, interpolated
from peerd.client.decoding import Decoding
from peerd.client.sampling import SamplingParams
from peerd.client.session.kept_sessions import AnswerSession
from peerd.client.speculation.confidence import Ask, grade_of
from peerd.client.speculation.draft_times import DraftTimes
from peerd.client.speculation.drafts import Draft
from peerd.client.speculation.speculation import Speculation
from peerd.client.speculation.step_times import MOST_DRAFTED
from peerd.meters import Meters

SERVERS = 3
RTTS_MS = (0.0, 10.0, 25.0, 100.0)
SESSIONS = (1, 4, 16)
SHARES = (0.5, 0.7, 0.9)
TOKENS = 200
# Each case is run so often, with other jitter; its figures are means.
RUNS = 4
ORACLE_SEED = 6
TEXTS = Path(__file__).with_name("speculation_texts.json")
# Seconds for a batch of so many positions on a server with ten blocks of SmolLM2-135M, packed in 4 bits, on one core: a
# third of what `make bench-packed` measured for thirty (benchmarks/results/2026-11-30-packed.md).
SERVER_S = ((1, 0.0070), (4, 0.0105), (16, 0.0263), (64, 0.072))
# Seconds for the client's head, on one core of a busy machine, the least of ten.
HEAD_S = ((1, 0.0035), (4, 0.0168), (16, 0.032), (32, 0.037))
# Heads: how often their guesses are right, and their seconds for a token: a good one, one that learnt little, and one
# that is too slow.
HEADS = (("a good head", 0.6, 0.004), ("a poor head", 0.2, 0.004), ("a slow head", 0.6, 0.08))


@dataclass(frozen=True)
class Row:
    """One case: tokens a second of all sessions, plain and with guesses; how many guesses were sent, and were right."""

    text: str
    rtt_ms: float
    sessions: int
    plain: float
    guessed: float
    drafted: int
    accepted: int
    bound: float | None = None

    @property
    def ratio(self) -> float:
        return self.guessed / self.plain


class SimulatedModel:
    """What decoding needs of a model whose answers are known. Tokens are numbered by their first occurrence."""

    def __init__(self, chain: SimulatedChain, text: Sequence[int], vocabulary: int) -> None:
        self.facts = SimpleNamespace(ropes_change_at=None, limits_rollback=False)
        self.meters = Meters()
        self.remote_vocab = None
        self._session = SimulatedSession(chain, text)
        self._vocabulary = vocabulary

    async def start_answer(self, prompt: Sequence[int], **_: object) -> AnswerSession:
        return AnswerSession(cast(Any, self._session), 0, None)

    def end_answer(self, answer: AnswerSession, ids: Sequence[int]) -> None:
        answer.session.close()

    def embed(self, token_ids: Sequence[int], start: int = 0) -> torch.Tensor:
        return torch.zeros(len(token_ids), 1)

    async def logits(self, hidden: torch.Tensor, most: int | None = None) -> torch.Tensor:
        await trio.sleep(interpolated(HEAD_S, len(hidden)))
        return torch.nn.functional.one_hot(hidden[:, 0].long(), self._vocabulary).float()

    async def in_thread(self, function: Callable[..., Any], *arguments: object) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    def decode(self, token_ids: Sequence[int]) -> str:
        return ""


class Known:
    """Guesses from a known text, each right with a set probability, always at the same positions."""

    def __init__(self, text: Sequence[int], right: float, seed: int) -> None:
        self._right = [random.Random(f"{seed} {at}").random() < right for at in range(len(text))]
        self._text = text

    def share(self, start: int, count: int) -> float:
        """The share of right guesses for so many tokens."""
        return statistics.mean(self._right[start : start + count])

    def sureness(self, position: int) -> float:
        """The probability that a model would give its guess: more where it is right."""
        luck = random.Random(position).random()
        return 0.3 + 0.7 * luck if self._right[min(position, len(self._right) - 1)] else 0.8 * luck

    def propose(self, text: Sequence[int], count: int) -> Draft:
        start = len(text)
        ahead = range(start, min(start + count, len(self._text)))
        # A wrong guess is a token that the text does not have there.
        return Draft(tuple(self._text[at] if self._right[at] else self._text[at] ^ 1 for at in ahead))


class KnownHead:
    """As `Known`, of a draft head: it takes time, and knows somewhat how sure it is. A `DraftSource` and a drafter."""

    ready = True
    reading_s = 0.0

    def __init__(self, known: Known, token_s: float) -> None:
        self.times = DraftTimes()
        self.times.note(1, token_s)
        self._known = known
        self._token_s = token_s

    def drafter(self, prompt: Sequence[int], length: int) -> KnownHead:
        return self

    async def propose(self, text: Sequence[int], ask: Ask) -> Draft:
        whole = self._known.propose(text, ask.count)
        grades: list[int] = []
        chance = 1.0
        for place, _ in enumerate(whole.tokens):
            await trio.sleep(self._token_s)
            grades.append(grade_of(self._known.sureness(len(text) + place)))
            chance *= ask.shares[grades[-1]]
            if chance < ask.least:
                break
        return Draft(whole.tokens[: len(grades)], grades=tuple(grades))

    def computed(self, start: int, hidden: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        pass


Recorded = tuple[list[int], list[int]]
"""The tokens of a prompt and of the answer to it."""


def recorded() -> dict[str, Recorded]:
    """Prompts and answers by the kind of text."""
    return {name: (text["prompt"], text["answer"]) for name, text in json.loads(TEXTS.read_text()).items()}


def by_text(_: Sequence[int]) -> Speculation:
    """Guesses from the text itself."""
    return Speculation()


def by_head(right: float, token_s: float, text: Sequence[int]) -> Speculation:
    """Guesses from the text itself, and of a head."""
    return Speculation(model=KnownHead(Known(text, right, 5), token_s))


def by_oracle(right: float, text: Sequence[int]) -> Speculation:
    """Free guesses of known quality."""
    return Speculation(lambda: Known(text, right, ORACLE_SEED))


Make = Callable[[Sequence[int]], Speculation]


class Case:
    """Answers to one prompt over one chain, at once."""

    def __init__(self, answer: Recorded, rtt_ms: float, sessions: int, tokens: int = TOKENS) -> None:
        prompt, following = answer
        numbers: dict[int, int] = {}
        for token in (*prompt, *following):
            numbers.setdefault(token, len(numbers))
        self.text = [numbers[token] for token in (*prompt, *following)]
        # Twice as many, for the wrong guesses.
        self._vocabulary = 2 * len(numbers)
        self.prompt_length = len(prompt)
        self.tokens = min(tokens, len(following) - 1)
        self._rtt_s = rtt_ms / 1000
        self._sessions = sessions

    def run(self, make: Make | None, *, warm: bool = False) -> tuple[float, int, int]:
        """Tokens a second of all sessions, and how many guesses were sent and were right; the means of some runs.

        warm: an answer went before each, from which the client knows the chain and the drafter.
        """
        rates, drafted, accepted = zip(*(self._once(make, seed, warm) for seed in range(RUNS)), strict=True)
        return statistics.mean(rates), sum(drafted) // RUNS, sum(accepted) // RUNS

    def _once(self, make: Make | None, seed: int, warm: bool) -> tuple[float, int, int]:
        speculation = None if make is None else make(self.text)
        if warm:
            trio.run(self._run, speculation, seed + RUNS, clock=MockClock(autojump_threshold=0))
        return trio.run(self._run, speculation, seed, clock=MockClock(autojump_threshold=0))

    async def _run(self, speculation: Speculation | None, seed: int) -> tuple[float, int, int]:
        chain = SimulatedChain(SERVERS, self._rtt_s, partial(interpolated, SERVER_S), seed)
        rates: list[float] = []
        luck = random.Random(seed)
        answers = [self._decoding(chain, speculation) for _ in range(self._sessions)]
        async with trio.open_nursery() as nursery:
            await nursery.start(chain.run)
            async with trio.open_nursery() as answering:
                for answer in answers:
                    answering.start_soon(self._answer, answer, luck.uniform(0, 0.2), rates)
            nursery.cancel_scope.cancel()
        told = [answer.speculator for answer in answers if answer.speculator is not None]
        return sum(rates), sum(each.drafted for each in told), sum(each.accepted for each in told)

    def _decoding(self, chain: SimulatedChain, speculation: Speculation | None) -> Decoding:
        model = SimulatedModel(chain, self.text, self._vocabulary)
        params = SamplingParams(max_new_tokens=self.tokens)
        return Decoding(cast(Any, model), self.text[: self.prompt_length], params, speculation=speculation)

    async def _answer(self, decoding: Decoding, after_s: float, rates: list[float]) -> None:
        await trio.sleep(after_s)
        found, began = list[int](), 0.0
        async for picked in decoding.tokens():
            began = began or trio.current_time()
            found.append(picked.id)
        rates.append((len(found) - 1) / (trio.current_time() - began))
        assert found == self.text[self.prompt_length :][: self.tokens], "guessing changed a token"


def compare(text: str, rtt_ms: float, sessions: int, answer: Recorded, make: Make) -> Row:
    """One case with and without guesses."""
    case = Case(answer, rtt_ms, sessions)
    plain, _, _ = case.run(None)
    return Row(text, rtt_ms, sessions, plain, *case.run(make))


def step_s(rtt_ms: float, drafted: int) -> float:
    """How long a step with so many guesses takes that has the chain for itself."""
    servers = SERVERS * interpolated(SERVER_S, 1 + drafted)
    return servers + (SERVERS + 1) * rtt_ms / 2000 + interpolated(HEAD_S, 1 + drafted)


def oracle_rows(rtts: Sequence[float]) -> Iterator[Row]:
    """Guesses of known quality beside the bound for those that the text met."""
    for rtt_ms, share in itertools.product(rtts, SHARES):
        prompt, answer = recorded()["story"]
        # The bound is that of a long text: an answer begins with a plain step and with short drafts.
        case = Case((prompt, answer * 3), rtt_ms, 1, 3 * len(answer))
        met = Known(case.text, share, ORACLE_SEED).share(case.prompt_length, case.tokens)
        plain, _, _ = case.run(None)
        found = Row(f"known, {share:g}", rtt_ms, 1, plain, *case.run(partial(by_oracle, share), warm=True))
        yield replace(found, bound=bound(met, partial(step_s, rtt_ms), MOST_DRAFTED))


def text_rows(rtts: Sequence[float], sessions: Sequence[int]) -> Iterator[Row]:
    """Recorded texts, with guesses from the text itself; and prose with a head's."""
    for (name, text), rtt_ms, count in itertools.product(recorded().items(), rtts, sessions):
        yield compare(name, rtt_ms, count, text, by_text)
    for (name, right, token_s), rtt_ms in itertools.product(HEADS, rtts):
        yield compare(f"story, {name}", rtt_ms, 1, recorded()["story"], partial(by_head, right, token_s))
