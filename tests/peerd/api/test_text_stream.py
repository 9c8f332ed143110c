"""Where a stop string ends a text that comes in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerd.client.text_stream import StopFilter

PIECES = st.lists(st.text("ab.", max_size=4), max_size=12)
STOPS = st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3)


def passed(stops, pieces):
    stop_filter = StopFilter(stops)
    out = []
    for number, piece in enumerate(pieces):
        out.append(stop_filter.add(piece, final=number == len(pieces) - 1))
        if stop_filter.stopped:
            break
    return out, stop_filter.stopped


@given(STOPS, PIECES)
def test_what_comes_out_is_the_text_before_the_first_stop(stops, pieces):
    out, stopped = passed(stops, pieces)
    seen, met = "", None
    for piece in pieces:
        seen += piece
        places = [place for stop in stops if (place := seen.find(stop)) >= 0]
        if places:
            met = min(places)
            break
    assert stopped == (met is not None)
    assert "".join(out) == (seen if met is None else seen[:met])


@given(STOPS, PIECES)
def test_nothing_is_held_back_that_cannot_become_a_stop(stops, pieces):
    stop_filter = StopFilter(stops)
    given_out = ""
    text = ""
    for piece in pieces:
        text += piece
        given_out += stop_filter.add(piece)
        if stop_filter.stopped:
            return
        held = text[len(given_out) :]
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize("piece", ["", "one", "one STOP"])
def test_after_a_stop_nothing_comes(piece):
    stop_filter = StopFilter(["STOP"])
    assert stop_filter.add("some STOP more") == "some "
    assert stop_filter.add(piece, final=True) == ""
