"""A short storm over a small swarm of real processes; and what its judges would say of a worse one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from benchmarks.chaos.answers import Answer, Counts, Reference
from benchmarks.chaos.chaos_bench import Plan, measure
from benchmarks.chaos.report import Disturbance, Run, Struck, as_json, percentile, show
from benchmarks.chaos.swarm import ChaosSwarm, Member
from peerd.client.sampling import SamplingParams
from peerd.protocol.span import Span

BRIEF = Plan(
    seconds=10.0,
    every_s=3.0,
    calm_s=1.0,
    restart_after_s=(0.5, 0.5),
    stopped_s=(2.0, 2.0),
    spans=2,
    sessions=4,
    max_tokens=40,
)


@pytest.mark.processes
@pytest.mark.real_time
async def test_two_kills_and_a_stop_cost_no_token_of_four_sessions(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = await measure(BRIEF, tiny_model, Console(quiet=True))
    assert [each.kind for each in run.disturbances] == ["kill", "stop", "kill"]
    assert run.failures == []
    assert run.coverage == {Span(0, 3): pytest.approx(1), Span(3, 6): pytest.approx(1)}
    assert run.verdict.tokens >= 100
    assert 0 < run.verdict.sampled < run.verdict.tokens
    # Half of the sessions guess at times, most of it right; their answers are compared like all others.
    guessed = [each for each in run.answers if each.guesses[0]]
    assert 0 < sum(each.guesses[1] for each in guessed) < sum(each.guesses[0] for each in guessed)
    assert len(guessed) < len(run.answers)
    # A killed server answers one more step at most, which is one token where nothing was guessed.
    struck = [one for each in run.disturbances if each.kind == "kill" for one in each.struck]
    killed = [one for one in struck if not one.answer.guesses[0]]
    assert all(one.lost for one in killed if len(one.answer.times) >= one.index + 2)
    assert all(one.after.replayed for one in killed if one.lost and one.held)


def answer(times: list[float], counts: list[Counts] | None = None) -> Answer:
    """One whose tokens came then."""
    made = Answer(
        [1], SamplingParams(), 0.0, SimpleNamespace(session=None, speculator=None), list(range(len(times))), times
    )  # type: ignore[arg-type]
    made.counts = counts or [Counts()] * len(times)
    return made


def test_a_stall_is_what_the_gap_of_the_death_or_the_next_took_beyond_the_usual() -> None:
    # The calm, from 0 to 10, has gaps of 1 s; a peer is killed when the twelfth token has come.
    before, after = Counts(0, 0, 5), Counts(1, 0, 16)
    struck = answer([*range(12), 11.5, 14.5, 15.5], [before] * 13 + [after] * 2)
    run = Run(calm_at=0.0, chaos_at=10.0, answers=[struck])
    run.disturbances = [Disturbance("kill", "1a", Span(0, 3), 1.2, [Struck(struck, 12, 11, before)])]
    assert run.usual_s == 1.0
    assert run.stalls_s() == {"kill": [2.0], "stop": [], "both": []}
    # From the eleventh token to the twelfth, and the last gap.
    assert run.elsewhere_s() == [0.0, 0.0]
    found = as_json(run)
    assert (found["sessions_that_lost_a_hop"], found["positions_held_by_lost_hops"]) == (1, 11)
    assert found["positions_replayed_for_them"] == 11


def test_a_session_that_two_disturbances_strike_at_once_is_counted_apart() -> None:
    struck = answer([0.0, 1.0, 9.0])
    run = Run(calm_at=0.0, chaos_at=1.0, answers=[struck])
    run.disturbances = [
        Disturbance("stop", "1a", Span(0, 3), 0.0, [Struck(struck, 2, 2, Counts())]),
        Disturbance("kill", "2a", Span(3, 6), 2.0, [Struck(struck, 2, 2, Counts())]),
    ]
    assert run.stalls_s() == {"kill": [], "stop": [], "both": [7.0]}


async def test_blocks_are_covered_while_any_owner_serves() -> None:
    members = [Member(name, Span(0, 3), SimpleNamespace()) for name in ("1a", "1b")]  # type: ignore[arg-type]
    members[0].history = [(0.0, "serving"), (10.0, "dead"), (18.0, "serving")]
    members[1].history = [(5.0, "serving"), (14.0, "stopped"), (30.0, "serving")]
    swarm = ChaosSwarm(SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    swarm.members = members
    assert swarm.coverage(0.0, 40.0) == {Span(0, 3): pytest.approx(0.9)}
    assert swarm.covered(20.0, 40.0)
    assert not swarm.covered(13.0, 15.0)


def test_what_a_run_must_not_have_is_a_failure_by_name() -> None:
    assert Run(coverage={Span(0, 3): 0.96}).failures == []
    run = Run(coverage={Span(0, 3): 0.94}, errors=["NoChain"], ended_by_themselves=["1a ended"], left_over=[7])
    run.verdict.wrong = ["token 3"]
    assert len(run.failures) == 5


def test_an_answer_with_another_token_than_the_reference_is_wrong(tiny_model: Path) -> None:
    reference = Reference(tiny_model)
    for params in (SamplingParams(max_new_tokens=8), SamplingParams(max_new_tokens=8, temperature=0.8, seed=3)):
        right = answer([float(index) for index in range(8)])
        right.params, right.prompt, right.token_ids = params, [1, 2, 3], []
        for _ in range(8):
            right.token_ids.append(reference.next_token(right))
        assert reference.judge([right]).wrong == []
        right.token_ids[5] += 1
        assert "token 5" in reference.judge([right]).wrong[0]
        right.token_ids = right.token_ids[:4]
        assert "4 tokens of 8" in reference.judge([right]).wrong[0]


def test_the_table_shows_an_empty_run_too(capsys: pytest.CaptureFixture[str]) -> None:
    show(replace(Run(), coverage={Span(0, 3): 1.0}), Console(width=120))
    assert "none" in capsys.readouterr().out
    json.dumps(as_json(replace(Run(), coverage={Span(0, 3): 1.0})), allow_nan=False)


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile(range(1, 101), 95) == 95
