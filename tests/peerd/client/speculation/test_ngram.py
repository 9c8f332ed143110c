"""The drafter that looks into the text itself."""

import tracemalloc

import pytest

from peerd.client.speculation.drafts import Draft
from peerd.client.speculation.ngram import LONGEST_MATCH, NgramDrafter


def propose(text, count=4):
    return NgramDrafter().propose(text, count)


@pytest.mark.parametrize("text", [[], [1], [1, 2], [1, 2, 3, 4], [1, 1]])
def test_a_text_that_repeats_nothing_gives_no_guess(text):
    assert propose(text) == Draft()


def test_what_followed_the_same_tokens_is_guessed():
    assert propose([1, 2, 3, 4, 5, 6, 9, 1, 2]) == Draft((3, 4, 5, 6), 2)


def test_the_longest_match_wins_over_a_later_one():
    assert propose([7, 1, 2, 3, 50, 0, 1, 2, 3, 60, 7, 1, 2, 3], 1) == Draft((50,), 4)


def test_of_equal_matches_the_latest_wins():
    assert propose([5, 1, 2, 50, 6, 1, 2, 60, 7, 1, 2], 1) == Draft((60,), 2)


def test_a_loop_goes_on_as_a_loop():
    assert (propose([0, 8, 9, 8, 9], 5)).tokens == (8, 9, 8, 9, 8)
    assert (propose([3, 3, 3], 3)).tokens == (3, 3, 3)


def test_no_more_guesses_than_asked_for():
    assert len(propose([1, 2, 3, 1, 2], 0)) == 0
    assert len(propose([1, 2, 3, 1, 2], 31)) == 31


def test_long_matches_are_graded_alike():
    text = list(range(100)) * 2
    assert (propose(text)).grade == LONGEST_MATCH


def test_a_pair_that_occurs_everywhere_is_found_in_its_last_places_only():
    often = [1, 2, 9] * 1000
    assert propose([1, 2, 7, *often, 1, 2], 2) == Draft((9, 1), LONGEST_MATCH)
    # The longer match is further back than the places that are compared.
    assert propose([5, 1, 2, 7, *[0, 1, 2, 8] * 20, 5, 1, 2], 1) == Draft((8,), 2)


def test_a_long_text_takes_little_memory():
    text = [number * 7919 % 50_000 for number in range(40_000)]
    tracemalloc.start()
    drafter = NgramDrafter()
    drafter.propose(text, 4)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 160 * len(text)


def test_a_text_that_grows_is_read_once():
    drafter = NgramDrafter()
    text = [1, 2, 3, 4]
    for token in (1, 2, 3, 4, 1, 2):
        text.append(token)
        assert drafter.propose(text, 3) == NgramDrafter().propose(text, 3)
