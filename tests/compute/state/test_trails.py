"""Which states of a row are kept: a row can go on from anywhere at or above its floor, and old states are forgotten."""

from __future__ import annotations

import pytest

from peerd.compute.kv.state_layout import STATES, log_positions
from peerd.compute.state.trails import Trail

ROOM = 64


def grow(trail: Trail, start: int, count: int, *, begins: bool = False) -> None:
    """One batch that adds positions, for a row that may be cut ROOM positions behind its end."""
    trail.go_to(start, max(start - ROOM, 0))
    trail.add(start + count, trail.place_for_next(), begins=begins)


def test_a_row_of_tokens_never_needs_more_inputs_than_its_log_has() -> None:
    trail = Trail()
    for position in range(1000):
        grow(trail, position, 1)
        assert trail.oldest.position <= max(position - ROOM, 0)
        assert position + 1 - trail.oldest.position <= log_positions(ROOM)
        assert len({kept.place for kept in trail.kept}) == len(trail.kept) <= STATES


def test_a_row_goes_on_from_the_last_state_before_a_cut() -> None:
    trail = Trail()
    grow(trail, 0, 5)
    grow(trail, 5, 3)
    assert trail.go_to(8, 0).position == 8
    assert trail.go_to(7, 0).position == 5
    assert trail.go_to(4, 0).position == 0
    grow(trail, 4, 2)
    assert [kept.position for kept in trail.kept] == [0, 6]


def test_what_a_failed_run_has_added_is_dropped_when_it_runs_again() -> None:
    trail = Trail()
    grow(trail, 0, 5)
    grow(trail, 5, 3)
    again = trail.copy()
    grow(again, 5, 3)
    assert [kept.position for kept in again.kept] == [kept.position for kept in trail.kept] == [0, 5, 8]


def test_a_state_before_which_nothing_is_logged_is_the_oldest() -> None:
    trail = Trail()
    grow(trail, 0, 5)
    grow(trail, 5, 200, begins=True)
    assert trail.go_to(205, 141).position == trail.oldest.position == 205


def test_a_later_state_takes_the_place_of_the_oldest() -> None:
    trail = Trail()
    grow(trail, 0, 5)
    grow(trail, 5, 3)
    place = trail.drop_oldest()
    trail.put_oldest(6, place)
    assert [kept.position for kept in trail.kept] == [6, 8]
    assert len({kept.place for kept in trail.kept}) == 2


def test_a_row_that_was_never_computed_here_has_no_state() -> None:
    with pytest.raises(LookupError, match="before position 3"):
        Trail().go_to(3, 0)
