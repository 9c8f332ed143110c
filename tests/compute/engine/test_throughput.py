"""A block's speed is measured once for each set of conditions; a damaged file costs another measurement."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from peerd.compute.engine.throughput import measure_throughput, measured_throughput
from peerd.protocol.span import Span
from peerd.testing.fake_engine import FakeEngine

CPU = torch.device("cpu")


class CountingEngine(FakeEngine):
    """Counts how often it ran."""

    runs = 0

    def run(self, batch):
        self.runs += 1
        return super().run(batch)


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine(Span(3, 7), kv_tokens=256)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "peerd" / "throughput.json"


def ask(engine: CountingEngine, *, model: bytes = b"m", dtype: torch.dtype = torch.float32, how: str = "none") -> float:
    return measured_throughput(engine, model, dtype, how, CPU)


def test_a_second_peer_reads_what_the_first_measured(engine: CountingEngine, cache: Path) -> None:
    rate = ask(engine)
    assert rate > 0
    runs = engine.runs
    assert ask(engine) == rate
    assert engine.runs == runs


def test_what_matters_for_speed_is_measured_apart(engine: CountingEngine, cache: Path) -> None:
    for wish in ({}, {"model": b"n"}, {"dtype": torch.bfloat16}, {"how": "nf4"}):
        runs = engine.runs
        ask(engine, **wish)
        assert engine.runs > runs
    assert len(json.loads(cache.read_text())) == 4


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"a": "fast"}', b'{"a": NaN, "b": -1}'])
def test_a_damaged_file_is_measured_over(engine: CountingEngine, cache: Path, content: bytes) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    rate = ask(engine)
    assert list(json.loads(cache.read_text()).values()) == [rate]


def test_other_peers_figures_stay(engine: CountingEngine, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text('{"another": 12.5}')
    ask(engine)
    assert json.loads(cache.read_text())["another"] == 12.5


def test_a_cache_that_cannot_be_written_costs_only_time(
    engine: CountingEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert ask(engine) > 0


def test_measuring_leaves_the_engine_as_it_was(engine: CountingEngine) -> None:
    free = engine.free_tokens
    measure_throughput(engine)
    assert engine.free_tokens == free
    assert engine.positions_computed == engine.batches_run == 0
    assert not engine.ready()


def test_the_rate_is_a_blocks_share_of_a_decode_step(engine: CountingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def run(batch):
        nonlocal now
        # A tenth of a second for each position: of a decode step, not of the prefill before it.
        now += 0.1 * batch.positions
        return FakeEngine.run(engine, batch)

    monkeypatch.setattr(engine, "run", run)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert measure_throughput(engine) == pytest.approx(4 / 0.1)


def test_a_pool_of_a_single_page_can_be_measured() -> None:
    assert measure_throughput(CountingEngine(Span(0, 1), kv_tokens=16)) > 0


def test_no_more_positions_are_measured_than_the_model_takes(engine: CountingEngine) -> None:
    """GPT-J looks positions up in a table, which ends there."""
    ends = []
    submit = engine.submit
    engine.submit = lambda step: (ends.extend(piece.end for piece in step.rows), submit(step))[1]  # type: ignore[method-assign]
    measure_throughput(engine, max_length=32)
    assert max(ends) == 32
