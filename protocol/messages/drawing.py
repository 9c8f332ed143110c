"""How a client has the last hop of a session draw tokens, and the bytes of what was drawn (spec/sessions/drawing.md).

`Sampling` and `Draw` travel on the last hop's control stream, so that no other hop learns what was asked. The answer is
an `Output` whose body holds tokens in place of hidden states.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from peerd.protocol.encoding.schema import Message, built, group, integer, many, number, optional, required
from peerd.protocol.errors import BadResult, RemoteProtocolError
from peerd.protocol.rows import RowSlice

#: The feature that a last hop needs which draws tokens.
HEAD = "head"
#: How meters call the form of such answers, beside the codecs of tensors.
DRAWN = "drawn"
#: How many tokens one step may have drawn: each takes a row of logits, as wide as the vocabulary.
MAX_DRAWN = 512
#: How many of the most likely tokens may come beside each.
MAX_ALTERNATIVES = 20
MAX_BIASES = 1024
MAX_ENDS = 64
_U32 = 2**32 - 1
_PAIR = struct.Struct("<If")
_NUMBER = 1e9

TokenPairs = tuple[tuple[int, float | None], ...]
"""A token that was drawn, and after it the most likely ones, each with its log-probability (None: not asked for)."""

_token = integer(0, 2**31 - 1)


@dataclass(frozen=True, slots=True)
class Sampling(Message):
    """Client to last hop: how tokens are drawn from the next `draw` on.

    prompt_length: how many positions of a row are its prompt; the others count as its answer.
    logprobs: how many of the most likely tokens come beside each token, with log-probabilities; None: none at all.
    """

    TYPE: ClassVar[str] = "sampling"
    temperature: float = optional(number(0, _NUMBER), 0.0)
    top_k: int = optional(integer(0, _U32), 0)
    top_p: float = optional(number(0, 1), 1.0)
    min_p: float = optional(number(0, 1), 0.0)
    repetition_penalty: float = optional(number(0, _NUMBER), 1.0)
    frequency_penalty: float = optional(number(-_NUMBER, _NUMBER), 0.0)
    presence_penalty: float = optional(number(-_NUMBER, _NUMBER), 0.0)
    logit_bias: tuple[tuple[int, float], ...] = optional(
        many(group(_token, number(-_NUMBER, _NUMBER)), MAX_BIASES), (), lambda pairs: [list(pair) for pair in pairs]
    )
    seed: int = optional(integer(1 - 2**63, 2**63 - 1), 0)
    min_new_tokens: int = optional(integer(0, 2**24), 0)
    ends: tuple[int, ...] = optional(many(_token, MAX_ENDS), (), list)
    prompt_length: int = optional(integer(0, 2**24), 0)
    logprobs: int | None = optional(integer(0, MAX_ALTERNATIVES), None)


_slices = many(built(group(integer(0, 255), integer(0, 2**24), integer(1, 2**24)), RowSlice), 256)


def _dump_slices(slices: tuple[RowSlice, ...]) -> list[list[int]]:
    return [[piece.row, piece.start, piece.count] for piece in slices]


@dataclass(frozen=True, slots=True)
class Draw(Message):
    """Client to last hop: draw a token after each position that step `seq` wants.

    context: which tokens the body holds, as slices of rows: the hop has those before them. `rows`: draw for each of
    these rows after the only position that is wanted, instead of once for the position's own row.
    """

    TYPE: ClassVar[str] = "draw"
    seq: int = required(integer(1, _U32))
    context: tuple[RowSlice, ...] = optional(_slices, (), _dump_slices)
    rows: tuple[int, ...] = optional(many(integer(0, 255), 256), (), list)


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as they travel in the body of a `Draw`."""
    return np.asarray(ids, dtype="<u4").tobytes()


def unpack_ids(draw: Draw, body: memoryview) -> list[list[int]]:
    """The token ids in a draw's body, for each slice of its context. Raises RemoteProtocolError."""
    count = sum(piece.count for piece in draw.context)
    if body.nbytes != 4 * count:
        raise RemoteProtocolError(f"a draw with {body.nbytes} bytes of context instead of {4 * count}")
    ids = np.frombuffer(body, "<u4").tolist()
    parts, offset = [], 0
    for piece in draw.context:
        parts.append(ids[offset : offset + piece.count])
        offset += piece.count
    return parts


def pack_drawn(drawn: Sequence[TokenPairs]) -> bytes:
    """What was drawn, as the body of an `Output`: for each token its id, or pairs of ids and log-probabilities.

    Raises BadResult for a log-probability that is not finite.
    """
    if any(value is not None and not math.isfinite(value) for pairs in drawn for _, value in pairs):
        raise BadResult("a log-probability is not finite")
    if drawn and drawn[0][0][1] is None:
        return pack_ids([pairs[0][0] for pairs in drawn])
    return b"".join(_PAIR.pack(token, value) for pairs in drawn for token, value in pairs)


def unpack_drawn(body: memoryview, count: int, logprobs: int | None, vocab_size: int) -> tuple[TokenPairs, ...]:
    """`count` tokens that a hop has drawn, of a vocabulary of so many, with as many alternatives as were asked for.

    Raises BadResult for bytes that no honest hop sends: more or fewer tokens, ids that the vocabulary does not have, or
    log-probabilities that are none.
    """
    pairs = 0 if logprobs is None else 1 + min(logprobs, vocab_size)
    size = 4 * count if logprobs is None else _PAIR.size * count * pairs
    if body.nbytes != size:
        raise BadResult(f"{body.nbytes} bytes of drawn tokens instead of {size}")
    found: list[tuple[int, float | None]]
    found = (
        [(token, None) for token in np.frombuffer(body, "<u4").tolist()] if not pairs else list(_PAIR.iter_unpack(body))
    )
    for token, value in found:
        if token >= vocab_size:
            raise BadResult(f"a token {token} was drawn, of a vocabulary of {vocab_size}")
        if value is not None and not -math.inf < value <= 0:
            raise BadResult(f"token {token} has the log-probability {value}")
    each = max(pairs, 1)
    return tuple(tuple(found[start : start + each]) for start in range(0, len(found), each))
