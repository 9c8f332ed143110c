"""What can be wrong with a checkpoint on this machine, as one clear error each.

These never travel: a peer that cannot open its own checkpoint does not serve, so they are not part of
the taxonomy that peers tell each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from peerd.protocol.span import Span


class CheckpointError(Exception):
    """A checkpoint cannot be used: absent, truncated, incomplete, or not what it says it is.

    The message names the file, and the tensor where there is one.
    """


class UnsupportedModel(CheckpointError):
    """The checkpoint is sound, but its architecture or storage is one that we do not run. The message says which."""


class AdapterError(CheckpointError):
    """An adapter cannot be used: absent, malformed, of a kind that we do not run, or made for another model.

    The message names the adapter, and the field or tensor where there is one.
    """


class HubUnavailable(CheckpointError):
    """The hub cannot be reached, fails, or may not be asked (offline mode), and what is needed is not on this machine.

    Nothing is wrong with the model: later, or with a network, it may work.
    """


class DiskFull(CheckpointError):
    """What has to be fetched does not fit on the disk, or into what `--disk` allows. Nothing was lost."""


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

    @classmethod
    def of(cls, blocks: Span, dtype: torch.dtype | None, what: str = "") -> NonFiniteError:
        """The error that names the blocks, what they compute in, and what to do. `what`: for what they gave it."""
        name = "" if dtype is None else str(dtype).removeprefix("torch.")
        remedy = (
            "its numbers end at 65504: serve with --dtype bfloat16"
            if name == "float16"
            else "their weights, or what they were given, are not what this model can compute with"
        )
        return cls(f"blocks {blocks} gave NaN or infinity{what}{f' in {name}' if name else ''}: {remedy}")
