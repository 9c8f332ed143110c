"""The messages on `/peerd/v1/session`: the wire's own messages where they fit, and a few more (spec/local-api.md).

This file defines each message's fields and limits, for the daemon and for clients of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peerd.protocol.encoding.schema import Message, boolean, integer, many, mapping, optional, parse, required, text
from peerd.protocol.encoding.wire import Buffer, MessageReader, RawMessage, encode_message
from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.messages.session import MAX_LENGTH, MAX_ROWS, U32, Failure, Output, Step
from peerd.protocol.messages.training import MAX_PARAMETERS

# Enough for a step of 4096 positions of the widest models, as float32.
MAX_BODY_BYTES = 256 * 1024 * 1024
# Token ids travel in the header, which holds 16 KiB.
MAX_TOKEN_IDS = 3000
# Requests that a client may send before the first is answered.
MAX_WAITING = 8
_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class LocalOpen(Message):
    """Client, first: a session over blocks `start` to `end - 1` of the model `model`; `end` 0 means to the last block.

    model: a name that the daemon was given, or the model's digest in hex.
    max_length: positions of a row. 0: no session, only requests that need none (embeddings, logits, passes).
    prompt_length: how long the text is that the session begins with (spec/sessions/session.md).
    adapter: the name of one that the swarm serves. parameters: how many matrices of the client's own follow.
    """

    TYPE: ClassVar[str] = "open"
    model: str = required(text(256))
    max_length: int = optional(integer(0, MAX_LENGTH), 0)
    max_rows: int = optional(integer(1, MAX_ROWS), 1)
    max_rollback: int = optional(integer(0, MAX_LENGTH), 0)
    prompt_length: int = optional(integer(0, MAX_LENGTH), 0)
    start: int = optional(integer(0, 4095), 0)
    end: int = optional(integer(0, 4096), 0)
    adapter: str = optional(text(128), "")
    parameters: int = optional(integer(0, MAX_PARAMETERS), 0)


@dataclass(frozen=True, slots=True)
class LocalParameter(Message):
    """A matrix of a LoRA pair beside a block's linear layer, `NAME.lora_A` or `NAME.lora_B`; a session's deep prompt,
    `prompt`; a block's `prefix_k` and `prefix_v` (spec/training/training.md); or the gradient of one of them.

    The client sends matrices after `open`, the daemon sends gradients after `gradients`. The scaling is part of B.
    """

    TYPE: ClassVar[str] = "parameter"
    block: int = required(integer(0, 4095))
    name: str = required(text(128))
    tensor: dict[str, Any] = required(mapping)


@dataclass(frozen=True, slots=True)
class SessionOpened(Message):
    """Daemon: every hop of a chain has committed its KV, if a session was asked for."""

    TYPE: ClassVar[str] = "opened"
    start: int = required(integer(0, 4095))
    end: int = required(integer(1, 4096))
    hidden_size: int = required(integer(1, 2**20))
    dtype: str = required(text(16))


@dataclass(frozen=True, slots=True)
class Embed(Message):
    """Client: asks for the first block's input for these tokens, the first of them at position `start`."""

    TYPE: ClassVar[str] = "embed"
    seq: int = required(integer(1, U32))
    token_ids: tuple[int, ...] = required(many(integer(0, _TOKEN_ID), MAX_TOKEN_IDS))
    start: int = optional(integer(0, MAX_LENGTH), 0)


@dataclass(frozen=True, slots=True)
class Logits(Message):
    """Client: asks for the logits of the hidden states in the body, `[n, hidden size]`, which the last block
    returned.
    """

    TYPE: ClassVar[str] = "logits"
    seq: int = required(integer(1, U32))
    tensor: dict[str, Any] = required(mapping)


@dataclass(frozen=True, slots=True)
class LocalForward(Message):
    """Client: run whole rows of these lengths through the session's blocks, without its KV.

    Body: hidden states `[sum of rows, hidden size]`, followed by `prompts` `[blocks, 1 or rows, P, hidden size]` if
    given. With `keep` a `backward` may follow.
    """

    TYPE: ClassVar[str] = "forward"
    seq: int = required(integer(1, U32))
    rows: tuple[int, ...] = required(many(integer(1, MAX_LENGTH), MAX_ROWS))
    tensor: dict[str, Any] = required(mapping)
    prompts: dict[str, Any] | None = optional(mapping, None)
    keep: bool = optional(boolean, False)


@dataclass(frozen=True, slots=True)
class LocalBackward(Message):
    """Client: asks for the gradients of the forward with the seq `of`; the body is the gradient of its output."""

    TYPE: ClassVar[str] = "backward"
    seq: int = required(integer(1, U32))
    of: int = required(integer(1, U32))
    tensor: dict[str, Any] = required(mapping)


@dataclass(frozen=True, slots=True)
class GradientsOutput(Message):
    """Daemon: the gradient of a forward's input, followed by that of its prompts if it had some.

    parameters: how many `parameter` messages follow, with the gradients of the matrices.
    """

    TYPE: ClassVar[str] = "gradients"
    seq: int = required(integer(1, U32))
    tensor: dict[str, Any] = required(mapping)
    prompts: dict[str, Any] | None = optional(mapping, None)
    parameters: int = optional(integer(0, MAX_PARAMETERS), 0)


FROM_CLIENT: tuple[type[Message], ...] = (Step, Embed, Logits, LocalForward, LocalBackward)
FROM_DAEMON: tuple[type[Message], ...] = (SessionOpened, Output, GradientsOutput, LocalParameter, Failure)


def read_message(data: bytes) -> RawMessage:
    """Decode a websocket message. Raises RemoteProtocolError."""
    reader = MessageReader(MAX_BODY_BYTES)
    used = reader.feed(data)
    message = reader.take()
    if message is None or used != len(data):
        raise RemoteProtocolError("a websocket message holds one whole message")
    return message


def read_open(raw: RawMessage) -> LocalOpen:
    """Decode the first message. Raises RemoteProtocolError."""
    return parse(raw.header, (LocalOpen,))


def read_parameter(raw: RawMessage) -> LocalParameter:
    """Decode one of the matrices after the first message. Raises RemoteProtocolError."""
    return parse(raw.header, (LocalParameter,))


def message_bytes(message: Message, body: list[memoryview] | None = None) -> bytes:
    """Encode a message as one websocket message."""
    parts: list[Buffer] = encode_message(message.to_header(), body or ())
    return b"".join(parts)
