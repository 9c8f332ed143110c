from __future__ import annotations

import pytest

from peerd.routing.audits.verdict import Verdict, judge


@pytest.mark.parametrize(
    ("auditor_differs", "third", "verdict"),
    [
        (False, None, Verdict.NOBODY),
        # A third is not asked, or cannot accuse anybody.
        (False, (True, True), Verdict.NOBODY),
        (True, (True, False), Verdict.SUSPECT),
        (True, (False, True), Verdict.AUDITOR),
        (True, (True, True), Verdict.UNDECIDED),
        (True, (False, False), Verdict.UNDECIDED),
        (True, None, Verdict.UNDECIDED),
    ],
)
def test_the_odd_one_of_three_is_convicted_and_nobody_by_one_voice(
    auditor_differs: bool, third: tuple[bool, bool] | None, verdict: Verdict
) -> None:
    assert judge(auditor_differs=auditor_differs, third=third) is verdict
