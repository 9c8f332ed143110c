"""The messages of training passes between a client and a hop, on one stream called a lane (spec/training/training.md).

This file defines each message's fields and limits. A tensor travels as consecutive rows in `part` messages, so that
no message is much larger than a mebibyte, however long the pass.
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
# The most positions of one request. A request of a single row may be longer, up to the model's limit.
MAX_PASS_POSITIONS = 4096
# How many requests of a lane may be unanswered: while one computes, the next travels.
MAX_REQUESTS = 2
# The most bytes of a part's body; a single row that is larger travels alone.
PART_BYTES = 2**20
MAX_PARAMETERS = 2**16
# The features of this version that a client may `need` on a lane.
PREFIXES = "prefixes"
PASS_FEATURES = frozenset({"lora", PREFIXES, "prompts"})

_blocks_start, _blocks_end = integer(0, 4095), integer(1, 4096)
_lengths = many(integer(1, MAX_LENGTH), MAX_PASS_ROWS)
# Shapes: [rows of a deep prompt,] rows, width.
_shape = many(integer(1, 2**31 - 1), 3)


@dataclass(frozen=True, slots=True)
class Begin(Message):
    """Client to hop, first on a lane: names the blocks that the passes run through.

    parameters: how many parameters (deep prompts, prefixes and LoRA tensors) follow.
    values: how many numbers those have in all.
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
    """Announces a tensor of one block: a parameter (client to hop) or its gradient (hop to client). Its parts
    follow.
    """

    TYPE: ClassVar[str] = "parameter"
    block: int = required(_blocks_start)
    name: str = required(text(128))
    shape: tuple[int, ...] = required(_shape)


@dataclass(frozen=True, slots=True)
class Begun(Message):
    """Hop to client: the lane is open, with its limits on positions in a request and on unanswered requests."""

    TYPE: ClassVar[str] = "begun"
    max_positions: int = required(integer(1, MAX_LENGTH))
    max_requests: int = required(integer(1, 64))


@dataclass(frozen=True, slots=True)
class Forward(Message):
    """Client to hop: run rows of these lengths. The parts of `[sum of rows, width]` follow.

    keep: the client will ask for the backward on this lane, so the hop keeps what helps it, if it has room.
    """

    TYPE: ClassVar[str] = "forward"
    seq: int = required(integer(1, U32))
    rows: tuple[int, ...] = required(_lengths)
    keep: bool = optional(boolean, False)


@dataclass(frozen=True, slots=True)
class Backward(Message):
    """Client to hop: the gradient of an output follows in parts; without `of`, the parts of the input come first.

    of: the `seq` of a forward whose input and graph the hop kept; `rows` must be the same.
    """

    TYPE: ClassVar[str] = "backward"
    seq: int = required(integer(1, U32))
    rows: tuple[int, ...] = required(_lengths)
    of: int | None = optional(integer(1, U32), None)


@dataclass(frozen=True, slots=True)
class Part(Message):
    """Consecutive rows `[n, width]` of the tensor that is being sent. `tensor` describes the body."""

    TYPE: ClassVar[str] = "part"
    tensor: dict[str, Any] = required(mapping)


@dataclass(frozen=True, slots=True)
class Result(Message):
    """Hop to client: the answer to a forward. The parts of `[sum of rows, width]` follow.

    kept: whether the hop kept what the backward needs.
    """

    TYPE: ClassVar[str] = "result"
    seq: int = required(integer(1, U32))
    kept: bool = optional(boolean, False)


@dataclass(frozen=True, slots=True)
class PassGradients(Message):
    """Hop to client: the answer to a backward. The input's gradient follows in parts, then each parameter's
    gradient.
    """

    TYPE: ClassVar[str] = "gradients"
    seq: int = required(integer(1, U32))
    parameters: int = optional(integer(0, MAX_PARAMETERS), 0)


@dataclass(frozen=True, slots=True)
class PassFailure(Message):
    """Hop to client: the lane ends with this error. `retry_ms`: in how many milliseconds to try this hop again, or
    0.
    """

    TYPE: ClassVar[str] = "error"
    code: str = required(text(64))
    message: str = optional(text(MAX_ERROR_TEXT), "")
    retry_ms: int = optional(integer(0, 600_000), 0)

    @classmethod
    def of(cls, error: PeerdError, retry_ms: int = 0) -> PassFailure:
        """The message that carries `error`."""
        return cls(error.code, str(error)[:MAX_ERROR_TEXT], retry_ms)

    @property
    def error(self) -> PeerdError:
        """The error that the message carries."""
        return from_wire(self.code, self.message)


# The messages that each side may send. Parts and parameters come only after a message that announced them.
PASS_FROM_CLIENT: tuple[type[Message], ...] = (Begin, Forward, Backward, Parameter, Part)
PASS_FROM_HOP: tuple[type[Message], ...] = (Begun, Result, PassGradients, Parameter, Part, PassFailure)
