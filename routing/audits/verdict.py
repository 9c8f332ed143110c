"""Decides which of three servers computed something else for the same input.

Two honest servers never differ, whatever their numerics: that is how the limits were measured. So of two that differ
one lies, and a third tells which, unless it is in league with the liar. One voice alone convicts nobody.
"""

from __future__ import annotations

from enum import Enum, auto


class Verdict(Enum):
    """Who computed something else."""

    SUSPECT = auto()
    """The server that was part of the answer."""
    AUDITOR = auto()
    """The server that was asked to compute the same."""
    NOBODY = auto()
    """All agree: what differed before does not now."""
    UNDECIDED = auto()
    """More than one of them, or there is no third, or the third agrees with both."""


def judge(*, auditor_differs: bool, third: tuple[bool, bool] | None) -> Verdict:
    """The verdict about a suspect and an auditor.

    auditor_differs: whether these two differ. third: whether a third server differs from the suspect, and whether it
    differs from the auditor; None if there is none.
    """
    if not auditor_differs:
        return Verdict.NOBODY
    match third:
        case (True, False):
            return Verdict.SUSPECT
        case (False, True):
            return Verdict.AUDITOR
        case _:
            return Verdict.UNDECIDED
