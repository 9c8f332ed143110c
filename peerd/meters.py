"""What one peer counts and times while it works, for its operator: plain numbers, changed on the event loop.

A step may be measured several times, so noting a value takes a fraction of a microsecond: no lock, no label looked up
by text that a stranger chose. There is one `Meters` for each peer, which its rooms are given; `api/metrics` turns it
into a text for Prometheus when that asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

# From a batch of one decode on a GPU to a prefill on a slow CPU.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Answers begin when a chain was found, opened and has computed the prompt.
_LONG_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SESSIONS = (1, 2, 4, 8, 16, 32, 64, 128)
_POSITIONS = (1, 4, 16, 64, 256, 1024, 4096)

Direction = Literal["sent", "received"]


class Histogram:
    """How many values lay in each bucket, and their sum. A bucket holds what is at most its bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        #: One more than there are bounds: the last is for greater values.
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def __repr__(self) -> str:
        return f"<Histogram of {sum(self.counts)}>"

    def observe(self, value: float) -> None:
        """Note one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class AnswerTrace(Protocol):
    """Follows one answer for whoever reads traces. It must not wait."""

    def serving(self, hops: Sequence[tuple[str, str]]) -> None:
        """The hops of the chain now, each a PeerId and its blocks."""

    def prompt(self, number: int, hop: tuple[str, str], ago_s: float, took_s: float) -> None:
        """A hop began to compute a prompt `ago_s` seconds ago, and took `took_s` for it. number: its place in the
        chain.
        """

    def end(self, how: str, tokens: int) -> None:
        """How the answer ended, and how many tokens it had."""


class Traces(Protocol):
    """Begins a trace for each answer."""

    def begin(self) -> AnswerTrace: ...


class Meters:
    """One peer's figures since it started. `traces`: what follows its own answers one by one, if anything does.

    Of its server: batch_sessions, batch_positions, batch_s: how many steps and positions a batch had, and how long it
    took. queued_s: how long a step waited before a batch took it. steps: by how they ended.
    Of its own answers: prompt_tokens, cached_tokens: of prompts, and those that earlier sessions had computed.
    first_token_s, between_tokens_s: how long tokens took. tokens: how many there were. answers: by
    how they ended. drafted, accepted: guesses that were sent, and that were right. failovers: hops that were replaced.
    hop_delay_s: the delay to each hop when it joined a chain.
    Of both: tensor_bytes: hidden states by codec and direction.
    """

    def __init__(self) -> None:
        self.batch_sessions = Histogram(_SESSIONS)
        self.batch_positions = Histogram(_POSITIONS)
        self.batch_s = Histogram(_SECONDS)
        self.queued_s = Histogram(_SECONDS)
        self.steps: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.first_token_s = Histogram(_LONG_SECONDS)
        self.between_tokens_s = Histogram(_SECONDS)
        self.tokens = 0
        self.answers: Counter[str] = Counter()
        self.drafted = 0
        self.accepted = 0
        self.failovers = 0
        self.hop_delay_s = Histogram(_SECONDS)
        self.tensor_bytes: Counter[tuple[str, Direction]] = Counter()
        self.traces: Traces | None = None

    def __repr__(self) -> str:
        return f"<Meters tokens={self.tokens} steps={self.steps.total()}>"

    def sent(self, codec: str, body: Iterable[memoryview]) -> None:
        """Note hidden states that go to another peer. `codec` is one that we know."""
        for part in body:
            self.tensor_bytes[codec, "sent"] += part.nbytes

    def received(self, codec: str, body: memoryview) -> None:
        """Note hidden states that came. `codec` is one that we know: what a peer wrote was checked before."""
        self.tensor_bytes[codec, "received"] += body.nbytes
