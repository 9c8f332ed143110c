"""Why an engine refuses a session or a step.

`compute` knows no wire, so these are not the errors that travel: the daemon maps each to its own
(`NoRoom`, `ContextTooLong`, `InvalidRequest`, a `gap` message, `BadResult`).
"""

from __future__ import annotations


class EngineError(Exception):
    """The engine cannot do what was asked of it."""


class NoRoomError(EngineError):
    """Too few uncommitted KV tokens now; `free_tokens` says how many there are."""

    def __init__(self, message: str, free_tokens: int) -> None:
        super().__init__(message)
        self.free_tokens = free_tokens


class ContextTooLongError(EngineError):
    """More positions than the session committed, or than the whole pool could ever hold."""


class InvalidStepError(EngineError):
    """The step or the opening is malformed: wrong shape, unknown row, a row twice."""


class StepGapError(EngineError):
    """The step starts beyond what a row caches; `have` is the length that each row will have by then."""

    def __init__(self, message: str, have: dict[int, int]) -> None:
        super().__init__(message)
        self.have = have


class UnknownAdapterError(EngineError):
    """No adapter of that name is loaded; the message says which are."""


class NonFiniteError(EngineError):
    """The blocks returned NaN or infinity for this session's positions."""
