from __future__ import annotations

from peerd.routing.audits.suspects import MAX_AUDITS, Suspects


def test_the_one_that_had_a_part_in_three_failed_audits_is_convicted() -> None:
    suspects = Suspects()
    assert suspects.note(["liar", "a", "b"]) is None
    assert suspects.note(["liar", "c", "d"]) is None
    assert suspects.note(["x", "y"]) is None
    assert suspects.note(["liar", "a", "e"]) == "liar"
    # What it explains is over.
    assert suspects.note(["liar", "a", "f"]) is None


def test_one_that_always_stands_beside_the_liar_is_not_told_from_it() -> None:
    suspects = Suspects()
    assert [suspects.note(["liar", "only server of its blocks", other]) for other in "abcdef"] == [None] * 6
    # Once it has been elsewhere, it is clear who lied.
    assert suspects.note(["liar", "another server"]) == "liar"


def test_old_audits_are_forgotten() -> None:
    suspects = Suspects()
    suspects.note(["liar", "a"])
    suspects.note(["liar", "b"])
    for number in range(MAX_AUDITS):
        suspects.note([f"x{number}", f"y{number}"])
    assert suspects.note(["liar", "c"]) is None


def test_a_voice_that_was_convicted_otherwise_is_cleared() -> None:
    suspects = Suspects()
    suspects.note(["liar", "a", "b"])
    suspects.note(["liar", "a", "c"])
    suspects.clear("liar")
    assert suspects.note(["a", "d"]) is None
