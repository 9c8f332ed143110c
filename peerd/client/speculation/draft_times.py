"""How long a draft model takes for a token, measured as it happens."""

from __future__ import annotations

# A new measurement weighs this much. The first few weigh equally.
_WEIGHT = 0.2
# A draft that takes more than this many times the usual was disturbed; it counts as this many.
_MOST_DISTURBED = 3.0


class DraftTimes:
    """The mean, shared by the answers of a model. Pure: the caller has the clock."""

    def __init__(self) -> None:
        self._token_s = 0.0
        self._count = 0

    def __repr__(self) -> str:
        return f"<DraftTimes {self._token_s:.3g} s a token>"

    @property
    def token_s(self) -> float | None:
        """Seconds for each token; None before something was measured."""
        return self._token_s if self._count else None

    def note(self, tokens: int, seconds: float) -> None:
        """So many tokens took `seconds`."""
        token_s = seconds / tokens
        if self._count:
            token_s = min(token_s, _MOST_DISTURBED * self._token_s)
        self._count += 1
        self._token_s += max(1 / self._count, _WEIGHT) * (token_s - self._token_s)
