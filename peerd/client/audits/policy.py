"""How often a client audits, and by which limits. It imports nothing slow: options and settings need it early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peerd.compute.audits.thresholds import Thresholds

# One answer in so many. An audit costs one prefill of the answer, so that audits add less than 2 % to what servers do.
DEFAULT_PROBABILITY = 1 / 50


@dataclass(frozen=True, slots=True)
class AuditPolicy:
    """With which probability an answer is audited; 0: never.

    thresholds: how far apart honest servers may be; None takes the table that comes with peerd.
    """

    probability: float = DEFAULT_PROBABILITY
    thresholds: Thresholds | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"a probability is between 0 and 1, not {self.probability}")

    @classmethod
    def of(cls, probability: float | None, *, is_private: bool) -> AuditPolicy:
        """The policy of a user who gave this probability, or none: members of a private swarm trust one another."""
        if probability is None:
            probability = 0.0 if is_private else DEFAULT_PROBABILITY
        return cls(probability)
