"""The messages of a session between a client, its hops, and neighbouring hops (spec/sessions/session.md).

This file defines each message's fields and limits. Activations travel as the message's body, described by its
`tensor` field (spec/tensors.md). The rules about which message may come when are in the hosted session (server) and
in the client's session.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from peerd.protocol.encoding.schema import (
    Message,
    binary,
    boolean,
    choice,
    group,
    integer,
    many,
    mapping,
    optional,
    required,
    text,
)
from peerd.protocol.errors import NoRoom, Overloaded, PeerdError, from_wire
from peerd.protocol.messages.audits import Copy, Sketch, sketch_seeds
from peerd.protocol.messages.drawing import HEAD, Draw, Sampling
from peerd.protocol.messages.receipts import Acknowledge, receipt_every
from peerd.protocol.messages.session_fields import (
    MAX_LENGTH as MAX_LENGTH,
)
from peerd.protocol.messages.session_fields import (
    MAX_ROWS as MAX_ROWS,
)
from peerd.protocol.messages.session_fields import (
    MAX_STEP_POSITIONS as MAX_STEP_POSITIONS,
)
from peerd.protocol.messages.session_fields import (
    U32 as U32,
)
from peerd.protocol.messages.session_fields import (
    NextHop as NextHop,
)
from peerd.protocol.messages.session_fields import (
    dump_next,
    dump_slices,
    maybe_next,
    row_length,
    row_lengths,
    row_number,
    row_slices,
    short_text,
)
from peerd.protocol.rows import LEAST_PREFILL_POSITIONS, PREFILL_POSITIONS, Drop, Fork, Op, RowSlice, SessionSize

INFER_PROTOCOL = "/peerd/infer/2"
LINK_PROTOCOL = "/peerd/link/2"
PROGRESS_PROTOCOL = "/peerd/progress/1"

# How many unanswered steps a client may have unless the hop grants more: enough to keep a chain of three hops busy with
# a prefill while one more step travels.
DEFAULT_MAX_STEPS = 4
MAX_ERROR_TEXT = 500
MAX_RETRY_MS = 600_000
# The `seq` of a step that replays positions that were sent before.
REPLAY_SEQ = 0
# The features of this version that a client may `need`.
PROMPT_LENGTH = "prompt_length"
FEATURES = frozenset({"bridge", "fork", HEAD, "own_adapter", "own_prefixes", "own_prompts", PROMPT_LENGTH, "route"})

Want = Literal["none", "last", "all"]


_OP_FORMS: dict[str, tuple[type[Op], Any]] = {
    "fork": (Fork, group(choice("fork"), row_number, row_number, row_length)),
    "drop": (Drop, group(choice("drop"), row_number)),
}


def _op(value: Any) -> Op:
    name = value[0] if type(value) in (list, tuple) and value else None
    if type(name) is not str or name not in _OP_FORMS:
        raise ValueError("a list of [fork, source, target, length] and [drop, row]")
    build, rule = _OP_FORMS[name]
    return build(*rule(value)[1:])


def _dump_op(op: Op) -> list[Any]:
    if isinstance(op, Fork):
        return ["fork", op.source, op.target, op.length]
    return ["drop", op.row]


@dataclass(frozen=True, slots=True)
class OpenSession(Message):
    """Client to each hop: commit KV memory for `max_rows` rows of `max_length` positions in these blocks.

    sketch: seeds of the sketches that the client wants (spec/sessions/audits.md).
    """

    TYPE: ClassVar[str] = "open"
    session: bytes = required(binary(16, 16))
    hop: int = required(integer(0, 255))
    epoch: int = required(integer(0, U32))
    model: bytes = required(binary(32, 32))
    start: int = required(integer(0, 4095))
    end: int = required(integer(1, 4096))
    max_length: int = required(integer(1, MAX_LENGTH))
    max_rows: int = optional(integer(1, MAX_ROWS), 1)
    max_rollback: int = optional(row_length, 0)
    prompt_length: int = optional(row_length, 0)
    max_steps: int = optional(integer(1, 64), DEFAULT_MAX_STEPS)
    dtype: str = optional(choice("float32", "float16", "bfloat16"), "float32")
    codec: str = optional(short_text, "exact")
    adapter: str = optional(text(128), "")
    timeout_ms: int = optional(integer(0, 600_000), 2000)
    needs: tuple[str, ...] = optional(many(short_text, 32), ())
    next: NextHop | None = optional(maybe_next, None, dump_next)
    sketch: tuple[bytes, ...] = optional(sketch_seeds, ())

    @property
    def size(self) -> SessionSize:
        """The cache that it asks for."""
        return SessionSize(self.max_length, self.max_rows, self.max_rollback, self.prompt_length)


@dataclass(frozen=True, slots=True)
class Opened(Message):
    """Hop to client: the KV memory is committed.

    have: how many positions of each row the hop already caches. receipt_every: after how many positions it wants a
    receipt; 0: never. step_positions: into steps of how many positions a long prompt should be cut.
    """

    TYPE: ClassVar[str] = "opened"
    epoch: int = required(integer(0, U32))
    max_steps: int = required(integer(1, 64))
    have: tuple[tuple[int, int], ...] = optional(row_lengths, ())
    receipt_every: int = optional(receipt_every, 0)
    step_positions: int = optional(integer(LEAST_PREFILL_POSITIONS, MAX_STEP_POSITIONS), PREFILL_POSITIONS)


@dataclass(frozen=True, slots=True)
class Route(Message):
    """Client to a hop: switch to epoch `epoch` and push results to `next` (None: answer the client)."""

    TYPE: ClassVar[str] = "route"
    epoch: int = required(integer(1, U32))
    next: NextHop | None = optional(maybe_next, None, dump_next)


@dataclass(frozen=True, slots=True)
class Bridge(Message):
    """Client to a hop: from epoch `epoch` on, send me the steps meant for your next hop, which has steps up to
    `taken`.
    """

    TYPE: ClassVar[str] = "bridge"
    epoch: int = required(integer(1, U32))
    taken: int = required(integer(0, U32))


@dataclass(frozen=True, slots=True)
class Routed(Message):
    """Hop to client: the new route works, and `replayed` positions were sent again along it."""

    TYPE: ClassVar[str] = "routed"
    epoch: int = required(integer(1, U32))
    replayed: int = optional(integer(0, U32), 0)


@dataclass(frozen=True, slots=True)
class Step(Message):
    """New positions of some rows, on their way down the chain. Body: `[sum of counts, hidden]`.

    `seq` 0 marks a replay, which no hop answers; a hop takes any other number once. `ops` apply before the rows.
    """

    TYPE: ClassVar[str] = "step"
    epoch: int = required(integer(0, U32))
    seq: int = required(integer(0, U32))
    rows: tuple[RowSlice, ...] = required(row_slices, dump_slices)
    tensor: dict[str, Any] | None = optional(mapping, None)
    want: Want = optional(choice("none", "last", "all"), "last")
    ops: tuple[Op, ...] = optional(many(_op, 2 * MAX_ROWS), (), lambda ops: [_dump_op(op) for op in ops])
    needs: tuple[str, ...] = optional(many(short_text, 32), ())

    @property
    def positions(self) -> int:
        return sum(slice_.count for slice_ in self.rows)


@dataclass(frozen=True, slots=True)
class Output(Message):
    """Last hop to client: the answer to step `seq`. `rows` says which positions the body is about.

    drawn: whether the body holds tokens (`unpack_drawn`) in place of hidden states.
    """

    TYPE: ClassVar[str] = "output"
    epoch: int = required(integer(0, U32))
    seq: int = required(integer(0, U32))
    rows: tuple[RowSlice, ...] = optional(row_slices, (), dump_slices)
    tensor: dict[str, Any] | None = optional(mapping, None)
    drawn: bool = optional(boolean, False)


@dataclass(frozen=True, slots=True)
class Gap(Message):
    """Hop to client: step `seq` starts behind the end of what this hop caches; `have` lists the cached lengths of
    rows.
    """

    TYPE: ClassVar[str] = "gap"
    epoch: int = required(integer(0, U32))
    seq: int = required(integer(0, U32))
    have: tuple[tuple[int, int], ...] = required(row_lengths)


@dataclass(frozen=True, slots=True)
class LinkDown(Message):
    """Hop to client: its link to the next hop does not work. Blames the link and neither peer."""

    TYPE: ClassVar[str] = "link_failed"
    epoch: int = required(integer(0, U32))
    message: str = optional(text(MAX_ERROR_TEXT), "")


@dataclass(frozen=True, slots=True)
class Failure(Message):
    """An error (spec/errors.md). With `seq`, it concerns that step; without, the session, which ends.

    retry_ms: in how many milliseconds the client may ask this hop again, if that can help; 0 if unknown.
    """

    TYPE: ClassVar[str] = "error"
    code: str = required(short_text)
    message: str = optional(text(MAX_ERROR_TEXT), "")
    seq: int | None = optional(integer(0, U32), None)
    free_tokens: int = optional(integer(0, 2**40), 0)
    retry_ms: int = optional(integer(0, MAX_RETRY_MS), 0)

    @classmethod
    def of(cls, error: PeerdError, seq: int | None = None) -> Failure:
        """The message that carries `error`."""
        free_tokens = error.free_tokens if isinstance(error, NoRoom) else 0
        retry_s = error.retry_after_s if isinstance(error, Overloaded) else 0.0
        retry_ms = min(MAX_RETRY_MS, math.ceil(1000 * retry_s))
        return cls(error.code, str(error)[:MAX_ERROR_TEXT], seq, free_tokens, retry_ms)

    @property
    def error(self) -> PeerdError:
        """The error that the message carries."""
        return from_wire(self.code, self.message, self.free_tokens, self.retry_ms / 1000)


@dataclass(frozen=True, slots=True)
class Ask(Message):
    """Client to hop, on a separate stream: asks how far the session is."""

    TYPE: ClassVar[str] = "ask"
    session: bytes = required(binary(16, 16))
    hop: int = required(integer(0, 255))


@dataclass(frozen=True, slots=True)
class Progress(Message):
    """Hop to client: how many steps of its session the hop has taken and done.

    turns: how many turns the device has finished, for any session.
    """

    TYPE: ClassVar[str] = "progress"
    taken: int = required(integer(0, U32))
    done: int = required(integer(0, U32))
    turns: int = required(integer(0, 2**53))


@dataclass(frozen=True, slots=True)
class Link(Message):
    """Upstream hop to downstream hop, first on a link: shows the ticket that the session's client signed."""

    TYPE: ClassVar[str] = "link"
    session: bytes = required(binary(16, 16))
    ticket: bytes = required(binary(1, 1024))


@dataclass(frozen=True, slots=True)
class Linked(Message):
    """Downstream hop to upstream hop: the link is accepted. `taken`: the last step that arrived here, 0 if none has."""

    TYPE: ClassVar[str] = "linked"
    taken: int = required(integer(0, U32))


# The messages that each side may send on each kind of stream.
CONTROL_FROM_CLIENT: tuple[type[Message], ...] = (OpenSession, Step, Route, Bridge, Acknowledge, Copy, Sampling, Draw)
CONTROL_FROM_HOP: tuple[type[Message], ...] = (Output, Opened, Routed, Gap, LinkDown, Failure, Step, Sketch)
PROGRESS_FROM_CLIENT: tuple[type[Message], ...] = (Ask,)
PROGRESS_FROM_HOP: tuple[type[Message], ...] = (Progress, Failure)
LINK_FROM_UPSTREAM: tuple[type[Step], ...] = (Step,)
LINK_FROM_DOWNSTREAM: tuple[type[Message], ...] = (Linked, Failure)
