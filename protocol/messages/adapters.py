"""Names of adapters, and the messages with which a client uploads its own adapter to a hop (spec/sessions/adapters.md).

The matrices travel as message bodies, encoded as tensors (spec/tensors.md).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from peerd.protocol.encoding.schema import Message, binary, choice, integer, mapping, optional, required
from peerd.protocol.span import MAX_BLOCKS

ADAPTER_PROTOCOL = "/peerd/adapter/1"
# The feature that a session `needs` in its `open` if its client uploads its own adapter.
OWN_ADAPTER = "own_adapter"
# The feature that it needs beside that if its adapter has deep prompts.
OWN_PROMPTS = "own_prompts"
# The same for keys and values that take the place of those of rows' first positions.
OWN_PREFIXES = "own_prefixes"
# Long enough that two adapters never share a tag by mistake. Deliberate collisions gain nothing.
TAG_BYTES = 8
MAX_SCALE = 1e9
# The most layers of one block that an upload may adapt: several times what any family has. Each layer costs a hop some
# memory beside its values, so the number of tiny ones must be bounded too.
MAX_PAIRS_A_BLOCK = 64
MAX_PAIRS = MAX_PAIRS_A_BLOCK * MAX_BLOCKS
# A deep prompt, and a prefix of keys and one of values.
MAX_PROMPTS_A_BLOCK = 3
MAX_VALUES = 1 << 40
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ID = re.compile(rf"({_NAME.pattern})@[0-9a-f]{{{2 * TAG_BYTES}}}")


def check_name(name: str) -> str:
    """Return `name` if it is a valid adapter name. Raises ValueError otherwise."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not an adapter's name: 1 to 64 letters, digits, '.', '_' and '-'")
    return name


def adapter_id(name: str, digest: bytes) -> str:
    """The id of an adapter in announcements and in `open`: its name and the beginning of its digest."""
    return f"{check_name(name)}@{digest[:TAG_BYTES].hex()}"


def name_of(adapter: str) -> str:
    """The name in an adapter's id; empty if `adapter` is not an id."""
    match = _ID.fullmatch(adapter)
    return match[1] if match else ""


def is_adapter_id(adapter: str) -> bool:
    """Whether the text is a full id (a name and the beginning of a digest), not only a name."""
    return bool(name_of(adapter))


def _scale(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > MAX_SCALE:
        raise ValueError(f"a number from -{MAX_SCALE:g} to {MAX_SCALE:g}")
    return float(value)


def _module(value: Any) -> str:
    if type(value) is not str or not 1 <= len(value) <= 200 or not value.isascii() or not value.isprintable():
        raise ValueError("1 to 200 printable ASCII characters")
    return value


_block = integer(0, MAX_BLOCKS - 1)


@dataclass(frozen=True, slots=True)
class Upload(Message):
    """Client to hop, first: the adapter has `pairs` pairs of matrices and `prompts` deep prompts and prefixes, with
    `values` values in all.

    `session` and `hop` name a session that is open on this hop.
    """

    TYPE: ClassVar[str] = "upload"
    session: bytes = required(binary(16, 16))
    hop: int = required(integer(0, 255))
    pairs: int = required(integer(0, MAX_PAIRS))
    values: int = required(integer(0, MAX_VALUES))
    prompts: int = optional(integer(0, MAX_PROMPTS_A_BLOCK * MAX_BLOCKS), 0)


@dataclass(frozen=True, slots=True)
class Granted(Message):
    """Hop to client: there is room, send the matrices."""

    TYPE: ClassVar[str] = "granted"


@dataclass(frozen=True, slots=True)
class MatrixA(Message):
    """Client to hop: the first matrix of a pair, `[rank, in_features]` in the body, and the pair's scale."""

    TYPE: ClassVar[str] = "a"
    block: int = required(_block)
    module: str = required(_module)
    scale: float = required(_scale)
    tensor: dict[str, Any] = required(mapping)


@dataclass(frozen=True, slots=True)
class MatrixB(Message):
    """Client to hop: the second matrix of the pair just begun, `[out_features, rank]` in the body."""

    TYPE: ClassVar[str] = "b"
    tensor: dict[str, Any] = required(mapping)


@dataclass(frozen=True, slots=True)
class Prompt(Message):
    """Client to hop, behind all pairs: values for each row's first positions in a block, `[positions, width]` in the
    body.

    name: what becomes of them. `prompt`: they are added to the block's input. `prefix_k`, `prefix_v`: they take the
        place of its attention's keys, or values.
    """

    TYPE: ClassVar[str] = "prompt"
    block: int = required(_block)
    tensor: dict[str, Any] = required(mapping)
    name: str = optional(choice("prompt", "prefix_k", "prefix_v"), "prompt")


@dataclass(frozen=True, slots=True)
class Loaded(Message):
    """Hop to client: from now on the session's steps use its adapter."""

    TYPE: ClassVar[str] = "loaded"
