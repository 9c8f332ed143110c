"""Finds the first hop of a chain whose result differs from that of other servers, in as few questions as possible.

Two chains got the same input and gave different results. So somewhere along the chain there is a hop before which they
agree and behind which they differ. Each question asks for the results up to the end of one hop.
"""

from __future__ import annotations


class Bisection:
    """The search in a chain of `hops` hops, at whose end the results differ."""

    def __init__(self, hops: int) -> None:
        # Behind so many hops the results agree, and behind so many they differ.
        self._agree = 0
        self._differ = hops

    def __repr__(self) -> str:
        return f"<Bisection between {self._agree} and {self._differ}>"

    @property
    def question(self) -> int | None:
        """Behind how many hops to compare next; None if the hop is found."""
        return (self._agree + self._differ) // 2 if self._differ - self._agree > 1 else None

    @property
    def found(self) -> int:
        """The index of the hop, once there is no further question."""
        return self._differ - 1

    def answer(self, hops: int, *, differs: bool) -> None:
        """Note whether the results differ behind so many hops."""
        if differs:
            self._differ = min(self._differ, hops)
        else:
            self._agree = max(self._agree, hops)
