"""The messages with which a client trains a peer's own weights, on one stream (spec/training/span-training.md).

Forwards and backwards are those of training passes (`messages/training.py`), without parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peerd.protocol.encoding.schema import Message, binary, choice, integer, many, number, optional, required, text
from peerd.protocol.errors import PeerdError, from_wire
from peerd.protocol.messages.session import MAX_ERROR_TEXT, MAX_LENGTH, U32
from peerd.protocol.messages.training import Backward, Forward, Part, PassGradients, Result

SPAN_PROTOCOL = "/peerd/train/1"

# The blocks of one trained model: their digests must fit into one header.
MAX_TRAINED_BLOCKS = 256
# How many snapshots a peer may keep of one client's copy.
MAX_SNAPSHOTS = 16
DIGEST_BYTES = 32

_blocks_start, _blocks_end = integer(0, 4095), integer(1, 4096)
_steps = integer(0, U32)
_rate = number(0, 1e6)
_digests = binary(DIGEST_BYTES, DIGEST_BYTES * MAX_TRAINED_BLOCKS)


@dataclass(frozen=True, slots=True)
class SpanBegin(Message):
    """Client to peer, first: train these blocks from now on.

    step: the snapshot from which to begin; 0: the published weights; None: the newest snapshot, if there is one.
    decay: the optimizer's weight decay.
    """

    TYPE: ClassVar[str] = "begin"
    model: bytes = required(binary(32, 32))
    start: int = required(_blocks_start)
    end: int = required(_blocks_end)
    optimizer: str = optional(choice("adamw", "sgd"), "adamw")
    decay: float = optional(number(0, 1), 0.0)
    step: int | None = optional(_steps, None)
    needs: tuple[str, ...] = optional(many(text(64), 32), ())


@dataclass(frozen=True, slots=True)
class SpanBegun(Message):
    """Peer to client: training begins at `step`.

    max_steps, max_rate: the operator's limits. saved: the steps of the snapshots that there are.
    """

    TYPE: ClassVar[str] = "begun"
    step: int = required(_steps)
    max_steps: int = required(_steps)
    max_rate: float = required(_rate)
    max_positions: int = required(integer(1, MAX_LENGTH))
    saved: tuple[int, ...] = optional(many(_steps, MAX_SNAPSHOTS), ())


@dataclass(frozen=True, slots=True)
class UpdateWeights(Message):
    """Client to peer: take one step with the gradients of the backwards since the last one.

    rate: the learning rate. clip: the largest norm of all gradients; 0: any.
    """

    TYPE: ClassVar[str] = "update"
    seq: int = required(integer(1, U32))
    rate: float = required(_rate)
    clip: float = optional(number(0, 1e12), 0.0)


@dataclass(frozen=True, slots=True)
class Updated(Message):
    """Peer to client: the step was taken. norm: of all gradients, before they were clipped."""

    TYPE: ClassVar[str] = "updated"
    seq: int = required(integer(1, U32))
    step: int = required(_steps)
    norm: float = required(number(0, 3.5e38))


@dataclass(frozen=True, slots=True)
class Save(Message):
    """Client to peer: write a snapshot."""

    TYPE: ClassVar[str] = "save"
    seq: int = required(integer(1, U32))


@dataclass(frozen=True, slots=True)
class Saved(Message):
    """Peer to client: the snapshot is on the peer's disk. digests: those of the span's blocks, 32 bytes each."""

    TYPE: ClassVar[str] = "saved"
    seq: int = required(integer(1, U32))
    step: int = required(_steps)
    digests: bytes = required(_digests)


@dataclass(frozen=True, slots=True)
class Publish(Message):
    """Client to peer: serve the newest snapshot as a part of another model.

    blocks, digests: all blocks of that model that differ from the base's, ascending, and their digests, 32 bytes each.
    """

    TYPE: ClassVar[str] = "publish"
    seq: int = required(integer(1, U32))
    blocks: tuple[int, ...] = required(many(_blocks_start, MAX_TRAINED_BLOCKS))
    digests: bytes = required(_digests)


@dataclass(frozen=True, slots=True)
class Published(Message):
    """Peer to client: the span is served as a part of the model with this digest."""

    TYPE: ClassVar[str] = "published"
    seq: int = required(integer(1, U32))
    model: bytes = required(binary(32, 32))


@dataclass(frozen=True, slots=True)
class SpanFailure(Message):
    """Peer to client. seq: the request that failed, and changed nothing; 0: the stream ends with this error."""

    TYPE: ClassVar[str] = "error"
    code: str = required(text(64))
    message: str = optional(text(MAX_ERROR_TEXT), "")
    seq: int = optional(integer(0, U32), 0)

    @classmethod
    def of(cls, error: PeerdError, seq: int = 0) -> SpanFailure:
        """The message that carries `error`."""
        return cls(error.code, str(error)[:MAX_ERROR_TEXT], seq)

    @property
    def error(self) -> PeerdError:
        """The error that the message carries."""
        return from_wire(self.code, self.message)


Request = Forward | Backward | UpdateWeights | Save | Publish
# The requests after `begin`, and what each side may send at all.
REQUESTS: tuple[type[Request], ...] = (Forward, Backward, UpdateWeights, Save, Publish)
SPAN_FROM_CLIENT: tuple[type[Message], ...] = (SpanBegin, *REQUESTS, Part)
SPAN_FROM_PEER: tuple[type[Message], ...] = (
    SpanBegun,
    Result,
    PassGradients,
    Updated,
    Saved,
    Published,
    Part,
    SpanFailure,
)


def joined(digests: tuple[bytes, ...] | list[bytes]) -> bytes:
    """Digests as they travel."""
    return b"".join(digests)


def parted(digests: bytes) -> tuple[bytes, ...]:
    """Digests as they came. The caller checks their number."""
    return tuple(digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES))
