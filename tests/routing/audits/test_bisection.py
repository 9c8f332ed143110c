from __future__ import annotations

import pytest

from peerd.routing.audits.bisection import Bisection


@pytest.mark.parametrize("hops", [1, 2, 3, 7, 8, 30])
def test_the_first_hop_that_differs_is_found_wherever_it_is_in_few_questions(hops: int) -> None:
    for liar in range(hops):
        bisection, questions = Bisection(hops), 0
        while (behind := bisection.question) is not None:
            assert 0 < behind < hops
            bisection.answer(behind, differs=behind > liar)
            questions += 1
        assert bisection.found == liar
        assert questions <= (hops - 1).bit_length()


def test_answers_that_contradict_what_is_known_change_nothing() -> None:
    bisection = Bisection(8)
    bisection.answer(4, differs=True)
    bisection.answer(6, differs=True)
    bisection.answer(3, differs=False)
    bisection.answer(1, differs=False)
    assert (bisection.question, bisection.found) == (None, 3)
