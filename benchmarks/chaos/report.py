"""The results of a run of `chaos`: stalls, replays, coverage and failures, as a table and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks.chaos.answers import Answer, Counts, Verdict
from peerd.protocol.span import Span

Kind = Literal["kill", "stop"]
MIN_COVERED = 0.95
TARGET_P95_S = 1.5


@dataclass(eq=False)
class Struck:
    """An answer whose chain had a disturbed peer. `index` tokens had come, and each hop had cached `held` positions."""

    answer: Answer
    index: int
    held: int
    before: Counts

    @property
    def gaps(self) -> range:
        """The gap between tokens in which it happened, and the next."""
        first = self.index - 1
        return range(max(first, 0), min(first + 2, len(self.answer.times) - 1))

    @property
    def after(self) -> Counts:
        """What the session had counted at the end of those gaps."""
        counts = self.answer.counts[self.index : self.index + 2]
        return counts[-1] if counts else self.before

    @property
    def lost(self) -> bool:
        """Whether the session had to replace the peer. It may not even notice a peer that stops briefly."""
        return self.after.failovers > self.before.failovers

    def stall_s(self, usual_s: float) -> float | None:
        """What the longer of those gaps took beyond `usual_s`. None for an answer that had not begun, or that needed no
        more of the peer.
        """
        gaps_s = [self.answer.gaps_s[gap] for gap in self.gaps]
        return max(0.0, max(gaps_s) - usual_s) if self.index and gaps_s else None


@dataclass(eq=False)
class Disturbance:
    """One peer that was killed or stopped, and the consequences."""

    kind: Kind
    member: str
    span: Span
    at_s: float
    struck: list[Struck]
    stopped_s: float | None = None
    # From the restart until the server served, and until one of the sessions had it in its chain.
    served_after_s: float | None = None
    chained_after_s: float | None = None


@dataclass(eq=False)
class Run:
    """The notes of one run."""

    # When the calm phase began, and when it ended.
    calm_at: float = 0.0
    chaos_at: float = 0.0
    disturbances: list[Disturbance] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    coverage: dict[Span, float] = field(default_factory=dict)
    # Errors while every block had a server, and other errors.
    errors: list[str] = field(default_factory=list)
    excused: list[str] = field(default_factory=list)
    ended_by_themselves: list[str] = field(default_factory=list)
    left_over: list[int] = field(default_factory=list)
    # How often a disturbance was due but no server could be spared.
    skipped: int = 0
    verdict: Verdict = field(default_factory=Verdict)

    @property
    def failures(self) -> list[str]:
        """List the reasons why this run is not a success."""
        bare = [span for span, share in self.coverage.items() if share < MIN_COVERED]
        return [
            *self.errors,
            *self.ended_by_themselves,
            *(f"blocks {span} had an owner for {self.coverage[span]:.1%} of the time only" for span in bare),
            *(f"wrong answer: {why}" for why in self.verdict.wrong),
            *(f"process {pid} still runs" for pid in self.left_over),
        ]

    @property
    def usual_s(self) -> float:
        """The 95th percentile of the gaps between tokens while nothing is disturbed."""
        return percentile(self.calm_gaps_s, 95)

    @property
    def calm_gaps_s(self) -> list[float]:
        """Gaps between tokens that both came in the calm phase."""
        return [
            until - since
            for answer in self.answers
            for since, until in pairwise(answer.times)
            if self.calm_at <= since and until <= self.chaos_at
        ]

    def first_tokens_s(self, *, calm: bool) -> list[float]:
        """Times from asking to the first token, of answers of the calm phase, or of later ones."""
        return [
            answer.times[0] - answer.started
            for answer in self.answers
            if answer.times and self.calm_at <= answer.started and (answer.times[0] <= self.chaos_at) == calm
        ]

    def stalls_s(self) -> dict[str, list[float]]:
        """Stalls of all sessions disturbed in the middle of an answer: by a kill, by a stop, or by two in the same
        gap.
        """
        times = Counter((one.answer, gap) for one in self.struck for gap in one.gaps)
        stalls: dict[str, dict[tuple[Answer, int], float]] = {"kill": {}, "stop": {}, "both": {}}
        for each in self.disturbances:
            for one in each.struck:
                several = any(times[one.answer, gap] > 1 for gap in one.gaps)
                if (stall_s := one.stall_s(self.usual_s)) is not None:
                    longest = max(one.gaps, key=lambda gap: one.answer.gaps_s[gap])
                    stalls["both" if several else each.kind][one.answer, longest] = stall_s
        return {name: list(found.values()) for name, found in stalls.items()}

    @property
    def struck(self) -> list[Struck]:
        return [one for each in self.disturbances for one in each.struck]

    def elsewhere_s(self) -> list[float]:
        """What all other gaps took beyond the usual: the cost of starting processes and of other sessions'
        failovers.
        """
        struck = {(one.answer, gap) for one in self.struck for gap in one.gaps}
        return [
            max(0.0, until - since - self.usual_s)
            for answer in self.answers
            for gap, (since, until) in enumerate(pairwise(answer.times))
            if since >= self.chaos_at and (answer, gap) not in struck
        ]


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value such that `per_cent` of the values are no greater; NaN without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else math.nan


def _spread(values: Sequence[float]) -> dict[str, float | int | None]:
    if not values:
        # JSON has no NaN.
        return {"count": 0, "p50": None, "p95": None, "max": None}
    return {
        "count": len(values),
        "p50": round(percentile(values, 50), 3),
        "p95": round(percentile(values, 95), 3),
        "max": round(max(values), 3),
    }


def as_json(run: Run) -> dict[str, Any]:
    """All figures of a run; times are in seconds."""
    lost = [one for one in run.struck if one.lost]
    totals = [answer.total for answer in run.answers]
    tokens = sum(len(answer.token_ids) for answer in run.answers)
    guesses = [answer.guesses for answer in run.answers]
    restarts = [each for each in run.disturbances if each.served_after_s is not None]
    return {
        "disturbances": [_disturbance(each, run.usual_s) for each in run.disturbances],
        "skipped": run.skipped,
        "coverage": {str(span): round(share, 4) for span, share in run.coverage.items()},
        "calm_gap_s": _spread(run.calm_gaps_s),
        "calm_first_token_s": _spread(run.first_tokens_s(calm=True)),
        "stall_s": {name: _spread(stalls) for name, stalls in run.stalls_s().items()},
        "elsewhere_s": _spread(run.elsewhere_s()),
        "first_token_s": _spread(run.first_tokens_s(calm=False)),
        "failovers": sum(total.failovers for total in totals),
        "reopened": sum(total.reopened for total in totals),
        "sessions_that_lost_a_hop": len(lost),
        "positions_held_by_lost_hops": sum(one.held for one in lost),
        "positions_replayed_for_them": sum(one.after.replayed - one.before.replayed for one in lost),
        "positions_replayed": sum(total.replayed for total in totals),
        "served_after_s": _spread([each.served_after_s for each in restarts if each.served_after_s is not None]),
        "chained_after_s": _spread([each.chained_after_s for each in restarts if each.chained_after_s is not None]),
        "answers": len(run.answers),
        "tokens": tokens,
        "guesses": {"sent": sum(sent for sent, _ in guesses), "right": sum(right for _, right in guesses)},
        "compared": {
            "tokens": run.verdict.tokens,
            "sampled": run.verdict.sampled,
            "near_ties": run.verdict.near_ties,
            "wrong": run.verdict.wrong,
        },
        "errors": run.errors,
        "excused_errors": run.excused,
        "ended_by_themselves": run.ended_by_themselves,
        "failures": run.failures,
    }


def _disturbance(each: Disturbance, usual_s: float) -> dict[str, Any]:
    stalls = [one.stall_s(usual_s) for one in each.struck]
    return {
        "kind": each.kind,
        "peer": each.member,
        "blocks": str(each.span),
        "at_s": round(each.at_s, 1),
        "stopped_s": each.stopped_s and round(each.stopped_s, 1),
        "stalls_s": [round(stall, 3) for stall in stalls if stall is not None],
        "lost": sum(one.lost for one in each.struck),
        "served_after_s": each.served_after_s and round(each.served_after_s, 1),
        "chained_after_s": each.chained_after_s and round(each.chained_after_s, 1),
    }


def show(run: Run, console: Console) -> None:
    """Print a table."""
    found = as_json(run)
    table = Table("", "", title="SmolLM2-135M-Instruct, fp32, all processes on this machine")
    kinds = [each["kind"] for each in found["disturbances"]]
    rows = {
        "killed / stopped and continued": f"{kinds.count('kill')} / {kinds.count('stop')}",
        "blocks with an owner, least": f"{min(run.coverage.values()):.1%} of the time",
        "gap between tokens, undisturbed": _seconds(found["calm_gap_s"]),
        "stall when a peer is killed": _seconds(found["stall_s"]["kill"]),
        "stall when a peer is stopped": _seconds(found["stall_s"]["stop"]),
        "stall when two are struck at once": _seconds(found["stall_s"]["both"]),
        "excess of all other gaps": _seconds(found["elsewhere_s"]),
        "first token, undisturbed": _seconds(found["calm_first_token_s"]),
        "first token": _seconds(found["first_token_s"]),
        "failovers": f"{found['failovers']}, of which {found['reopened']} kept no hop",
        "positions replayed": f"{found['positions_replayed_for_them']} where {found['sessions_that_lost_a_hop']} lost"
        f" hops held {found['positions_held_by_lost_hops']}; {found['positions_replayed']} in all",
        "started again: serves after": _seconds(found["served_after_s"]),
        "started again: used after": _seconds(found["chained_after_s"]),
        "compared with local Transformers": f"{found['answers']} answers, {run.verdict.tokens} tokens"
        f" ({run.verdict.sampled} sampled), {len(run.verdict.wrong)} wrong, {run.verdict.near_ties} near ties",
        "guesses sent / right": f"{found['guesses']['sent']} / {found['guesses']['right']}",
        "errors with an excuse": f"{len(run.excused)}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if (p95_s := found["stall_s"]["kill"]["p95"]) is not None:
        console.print(f"p95 of stalls by kills {'below' if p95_s < TARGET_P95_S else 'NOT below'} {TARGET_P95_S} s")
    for failure in run.failures:
        console.print(f"FAILED: {failure}", markup=False)


def _seconds(spread: dict[str, Any]) -> str:
    if not spread["count"]:
        return "none"
    return f"p50 {spread['p50']:.3f} s, p95 {spread['p95']:.3f} s, most {spread['max']:.3f} s ({spread['count']})"
