"""Speculation over simulated chains reaches its bounds; and what the benchmark has done, it does not do again."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.simulated import speculation_tables
from benchmarks.simulated.speculation_chain import bound, interpolated
from benchmarks.simulated.speculation_tables import Row, by_text, compare, oracle_rows, recorded, text_rows
from benchmarks.swarms.speculation_bench import Figure, Kept, error_of, key_of


@pytest.fixture(autouse=True)
def one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation_tables, "RUNS", 1)
    monkeypatch.setattr(speculation_tables, "SHARES", (0.7,))


def test_times_between_and_beyond_the_measured_ones() -> None:
    table = ((1, 1.0), (4, 4.0), (8, 6.0))
    assert [interpolated(table, count) for count in (1, 2, 4, 6, 8, 12)] == [1.0, 2.0, 4.0, 5.0, 6.0, 8.0]


def test_the_bound_is_that_of_the_best_number_of_guesses() -> None:
    assert bound(0.5, lambda count: 1.0, 2) == 1.75
    assert bound(0.5, lambda count: 1.0 + count, 8) == 1.0


def test_guesses_of_known_quality_come_near_the_bound() -> None:
    for row in oracle_rows([100.0]):
        assert row.bound is not None
        assert 0.85 * row.bound < row.ratio < 1.1 * row.bound


def test_a_copied_text_gains_much_and_prose_loses_nothing() -> None:
    texts = recorded()
    assert compare("verbatim", 100.0, 1, texts["verbatim"], by_text).ratio > 5.0
    assert compare("story", 10.0, 1, texts["story"], by_text).ratio > 0.98


def test_heads_gain_where_they_are_good_and_fast_and_lose_nothing_elsewhere() -> None:
    ratios = {row.text: row.ratio for row in text_rows([25.0], []) if row.sessions == 1}
    assert ratios["story, a good head"] > 1.4
    assert min(ratios.values()) > 0.97


def test_finished_cases_are_read_again(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    kept = Kept(file)
    figure, row = Figure("story", 10.0, 1.0, 2.0, 2.0, 0.01, 4, 5, 6), Row("story", 10.0, 4, 1.0, 2.0, 3, 4)
    kept.add(figure)
    kept.add(row)
    again = Kept(file)
    assert set(again.rows) == {key_of(figure), key_of(row)}
    assert [Figure(**found) for found in again.of(Figure)] == [figure]  # type: ignore[arg-type]
    assert Kept(None).of(Row) == []


def test_the_error_of_a_mean_shrinks_with_the_number_of_ratios() -> None:
    assert error_of([1.0]) == float("inf")
    assert error_of([1.0, 1.1] * 8) < error_of([1.0, 1.1] * 2)
