"""The messages of training passes: what a client and a hop say on a lane (spec/training.md).

Knows each message's fields and limits; knows neither streams nor tensors. A tensor travels as consecutive
rows in `part` messages, so that no message is larger than a mebibyte or so, however long the pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peerd.protocol.encoding.schema import (
    Message,
    binary,
    boolean,
    choice,
    integer,
    many,
    mapping,
    optional,
    required,
    text,
)
from peerd.protocol.errors import PeerdError, from_wire
from peerd.protocol.messages.session import MAX_ERROR_TEXT, MAX_LENGTH, U32

PASS_PROTOCOL = "/peerd/pass/1"

MAX_PASS_ROWS = 1024
# A request has at most so many positions, unless it is one row, which may be as long as the model takes.
MAX_PASS_POSITIONS = 4096
# Requests of a lane that may be unanswered: one computes, one travels.
MAX_REQUESTS = 2
# Of a part's body; a single row of a tensor that is larger travels alone.
PART_BYTES = 2**20
MAX_PARAMETERS = 2**16
# Everything this version of a hop can do that a client may `need` on a lane.
PASS_FEATURES = frozenset({"lora", "prompts"})

_blocks_start, _blocks_end = integer(0, 4095), integer(1, 4096)
_lengths = many(integer(1, MAX_LENGTH), MAX_PASS_ROWS)
# [rows of a deep prompt,] rows, width.
_shape = many(integer(1, 2**31 - 1), 3)


@dataclass(frozen=True, slots=True)
class Begin(Message):
    """Client to hop, first on a lane: passes over these blocks.

    So many `parameters` follow, of `values` numbers in all: deep prompts and LoRA tensors.
    """

    TYPE: ClassVar[str] = "begin"
    model: bytes = required(binary(32, 32))
    start: int = required(_blocks_start)
    end: int = required(_blocks_end)
    dtype: str = optional(choice("float32", "float16", "bfloat16"), "float32")
    codec: str = optional(text(64), "exact")
    adapter: str = optional(text(128), "")
    parameters: int = optional(integer(0, MAX_PARAMETERS), 0)
    values: int = optional(integer(0, 2**40), 0)
    needs: tuple[str, ...] = optional(many(text(64), 32), ())


@dataclass(frozen=True, slots=True)
class Parameter(Message):
    """A tensor that belongs to one block, client to hop; or its gradient, hop to client. Parts follow."""

    TYPE: ClassVar[str] = "parameter"
    block: int = required(_blocks_start)
    name: str = required(text(128))
    shape: tuple[int, ...] = required(_shape)


@dataclass(frozen=True, slots=True)
class Begun(Message):
    """Hop to client: the lane stands. So many positions a request, so many requests unanswered."""

    TYPE: ClassVar[str] = "begun"
    max_positions: int = required(integer(1, MAX_LENGTH))
    max_requests: int = required(integer(1, 64))


@dataclass(frozen=True, slots=True)
class Forward(Message):
    """Client to hop: run rows of these lengths; the parts of `[sum of rows, width]` follow.

    `keep`: their backward will follow on this lane, so keep what helps it, as far as there is room.
    """

    TYPE: ClassVar[str] = "forward"
    seq: int = required(integer(1, U32))
    rows: tuple[int, ...] = required(_lengths)
    keep: bool = optional(boolean, False)


@dataclass(frozen=True, slots=True)
class Backward(Message):
    """Client to hop: the gradient of an output, in parts; before it, without `of`, the parts of the input.

    `of`: the `seq` of the forward whose input and graph were kept; it has the same rows.
    """

    TYPE: ClassVar[str] = "backward"
    seq: int = required(integer(1, U32))
    rows: tuple[int, ...] = required(_lengths)
    of: int | None = optional(integer(1, U32), None)


@dataclass(frozen=True, slots=True)
class Part(Message):
    """Some consecutive rows `[n, width]` of the tensor that is travelling. Body: as `tensor` says."""

    TYPE: ClassVar[str] = "part"
    tensor: dict[str, Any] = required(mapping)


@dataclass(frozen=True, slots=True)
class Result(Message):
    """Hop to client: the answer to a forward. The parts of `[sum of rows, width]` follow. `kept`: for a backward."""

    TYPE: ClassVar[str] = "result"
    seq: int = required(integer(1, U32))
    kept: bool = optional(boolean, False)


@dataclass(frozen=True, slots=True)
class Gradients(Message):
    """Hop to client: the answer to a backward: the input's gradient in parts, then each parameter's."""

    TYPE: ClassVar[str] = "gradients"
    seq: int = required(integer(1, U32))
    parameters: int = optional(integer(0, MAX_PARAMETERS), 0)


@dataclass(frozen=True, slots=True)
class PassFailure(Message):
    """Hop to client: the lane ends, and why. `retry_ms`: when it may be tried here again, where that helps."""

    TYPE: ClassVar[str] = "error"
    code: str = required(text(64))
    message: str = optional(text(MAX_ERROR_TEXT), "")
    retry_ms: int = optional(integer(0, 600_000), 0)

    @classmethod
    def of(cls, error: PeerdError, retry_ms: int = 0) -> PassFailure:
        """How `error` travels."""
        return cls(error.code, str(error)[:MAX_ERROR_TEXT], retry_ms)

    @property
    def error(self) -> PeerdError:
        """The error that travelled."""
        return from_wire(self.code, self.message)


# Who says what. Parts and parameters come only where something announced them.
PASS_FROM_CLIENT: tuple[type[Message], ...] = (Begin, Forward, Backward, Parameter, Part)
PASS_FROM_HOP: tuple[type[Message], ...] = (Begun, Result, Gradients, Parameter, Part, PassFailure)
