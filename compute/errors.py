"""Errors about a checkpoint on this machine.

These errors do not travel: a peer that cannot open its own checkpoint does not serve.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from peerd.protocol.span import Span


class CheckpointError(Exception):
    """A checkpoint cannot be used: absent, truncated, incomplete, or not what it claims to be.

    The message names the file, and the tensor if the error concerns one.
    """


class UnsupportedModelError(CheckpointError):
    """The checkpoint is sound, but peerd does not run its architecture or storage format. The message says which."""


class UnusablePackageError(CheckpointError):
    """A package that the asked-for storage format needs is missing or broken. The message says which, and what to do.

    Nothing is wrong with the model: in another format it can be served.
    """


class AdapterError(CheckpointError):
    """An adapter cannot be used: absent, malformed, of a kind that peerd does not run, or made for another model.

    The message names the adapter, and the field or tensor if the error concerns one.
    """


class HubUnavailableError(CheckpointError):
    """The hub cannot be reached, fails, or may not be asked (offline mode), and the file is not on this machine.

    Nothing is wrong with the model: later, or with a network, it may work.
    """


class DiskFullError(CheckpointError):
    """The download does not fit on the disk, or within the limit of `--disk`. Nothing was lost."""


class EngineError(Exception):
    """The base of the engine's errors: it cannot do what was asked."""


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
    """The step starts beyond the end of a cached row; `have` is the length that each row has after all queued steps."""

    def __init__(self, message: str, have: dict[int, int]) -> None:
        super().__init__(message)
        self.have = have


class UnknownAdapterError(EngineError):
    """No adapter of that name is loaded; the message lists the loaded ones."""


class BatchFailedError(EngineError):
    """The device could not compute the session's part of a batch, alone either: no memory, or a bug."""


class NonFiniteError(EngineError):
    """The blocks returned NaN or infinity for this session's positions."""

    @classmethod
    def of(cls, blocks: Span, dtype: torch.dtype | None, what: str = "") -> NonFiniteError:
        """The error with the blocks' numbers, their dtype, and what to do. `what`: the input for which they gave it."""
        name = "" if dtype is None else str(dtype).removeprefix("torch.")
        remedy = (
            "its numbers end at 65504: serve with --dtype bfloat16"
            if name == "float16"
            else "their weights, or what they were given, are not what this model can compute with"
        )
        return cls(f"blocks {blocks} gave NaN or infinity{what}{f' in {name}' if name else ''}: {remedy}")
