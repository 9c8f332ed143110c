"""What is learnt from drafts, sent or not."""

import pytest

from peerd.client.speculation.acceptance import Acceptance, Watch
from peerd.client.speculation.confidence import PRIOR_SHARE
from peerd.client.speculation.drafts import Draft


def test_an_unknown_grade_has_the_prior():
    assert Acceptance().likely(Draft((1, 2, 3), 5)) == pytest.approx([PRIOR_SHARE, PRIOR_SHARE**2, PRIOR_SHARE**3])


def test_chances_fall_along_a_draft_and_approach_what_was_seen():
    acceptance = Acceptance()
    for number in range(400):
        acceptance.note(Draft((1,), 3), 0, number % 10 != 0)
    first, second = acceptance.likely(Draft((1, 2), 3))
    assert first == pytest.approx(0.9, abs=0.05)
    assert second == pytest.approx(PRIOR_SHARE * first)
    assert acceptance.likely(Draft((1,), 4)) == [PRIOR_SHARE]


def test_an_answer_begins_with_what_earlier_answers_showed():
    general = Acceptance()
    for _ in range(50):
        Acceptance(general).note(Draft((1,), 2), 0, True)
    assert Acceptance(general).likely(Draft((1,), 2))[0] > 0.9


def test_a_text_that_changes_is_noticed_within_some_tokens():
    acceptance = Acceptance()
    for _ in range(1000):
        acceptance.note(Draft((1,), 2), 0, True)
    for _ in range(64):
        acceptance.note(Draft((1,), 2), 0, False)
    assert acceptance.likely(Draft((1,), 2))[0] < 0.2


def test_a_draft_is_followed_to_its_first_wrong_token_only():
    acceptance = Acceptance()
    watch = Watch(acceptance)
    watch.proposed(Draft((10, 11, 12, 13), 1), 5)
    for position, token in enumerate((10, 99, 12, 13), 5):
        watch.came(token, position)
    shares = [acceptance.share(1, place) for place in range(4)]
    assert shares[0] > PRIOR_SHARE > shares[1]
    # What follows a wrong token says nothing: it was guessed for another text.
    assert shares[2:] == [PRIOR_SHARE, PRIOR_SHARE]


def test_drafts_that_overlap_are_followed_apart():
    acceptance = Acceptance()
    watch = Watch(acceptance)
    watch.proposed(Draft((1, 2), 1), 0)
    watch.came(1, 0)
    watch.proposed(Draft((9,), 2), 1)
    watch.came(2, 1)
    assert acceptance.share(1, 1) > PRIOR_SHARE > acceptance.share(2, 0)
