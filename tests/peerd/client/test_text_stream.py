"""Where a stop string ends a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerd.client.text_stream import StopFilter, TextStream

PIECES = st.lists(st.text("ab.", max_size=4), max_size=12)
STOPS = st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3)


def passed(stops, pieces):
    stop_filter = StopFilter(stops)
    out = []
    for number, piece in enumerate(pieces):
        out.append(stop_filter.add(piece, final=number == len(pieces) - 1))
        if stop_filter.met is not None:
            break
    return out, stop_filter.met


@given(STOPS, PIECES)
def test_what_comes_out_is_the_text_before_the_first_stop(stops, pieces):
    out, stopped_by = passed(stops, pieces)
    seen, met = "", None
    for piece in pieces:
        seen += piece
        places = [place for stop in stops if (place := seen.find(stop)) >= 0]
        if places:
            met = min(places)
            break
    assert (stopped_by is None) == (met is None)
    assert stopped_by is None or seen.startswith(stopped_by, met)
    assert "".join(out) == (seen if met is None else seen[:met])


@given(STOPS, PIECES)
def test_nothing_is_held_back_that_cannot_become_a_stop(stops, pieces):
    stop_filter = StopFilter(stops)
    given_out = ""
    text = ""
    for piece in pieces:
        text += piece
        given_out += stop_filter.add(piece)
        if stop_filter.met is not None:
            return
        held = text[len(given_out) :]
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize("piece", ["", "one", "one STOP"])
def test_after_a_stop_nothing_comes(piece):
    stop_filter = StopFilter(["STOP"])
    assert stop_filter.add("some STOP more") == "some "
    assert stop_filter.add(piece, final=True) == ""


@pytest.mark.parametrize("hidden", [[9], [9, 9], [9, 8, 9]])
def test_a_token_without_text_takes_no_space_from_the_next_word(hidden: list[int]) -> None:
    """A decoder like Llama 2's takes the space before the first word of what it is given."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = {"\u2581Hello": 0, "\u2581world": 1, "<unk>": 2, "!": 3, "<a>": 8, "<b>": 9}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<a>", "<b>")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    ids = [0, *hidden, 1, 3, *hidden, 0]
    stream = TextStream(decode)
    pieces = [stream.add(token, final=index == len(ids) - 1) for index, token in enumerate(ids)]
    assert "".join(pieces) == decode(ids) == "Hello world! Hello"
    assert pieces[1 : 1 + len(hidden)] == [""] * len(hidden)
