"""What the doctor found: one line for each thing that it looked at, with the fix where something is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """How bad a finding is. A daemon works in spite of a warning; it does not, or others do not see it, with an
    error.
    """

    OK = 0
    WARNING = 1
    ERROR = 2

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Finding:
    """About `what`, the doctor says `said`. `fix`: what to do; "" where nothing has to be done."""

    level: Level
    what: str
    said: str
    fix: str = ""


def ok(what: str, said: str) -> Finding:
    """Nothing has to be done."""
    return Finding(Level.OK, what, said)


def warning(what: str, said: str, fix: str) -> Finding:
    """A daemon works, but worse than it could."""
    return Finding(Level.WARNING, what, said, fix)


def error(what: str, said: str, fix: str) -> Finding:
    """A daemon does not work, or is of no use."""
    return Finding(Level.ERROR, what, said, fix)


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among the findings."""
    return max((finding.level for finding in findings), default=Level.OK)
