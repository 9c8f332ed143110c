"""Checks the tensors of steps, cuts out the positions that a client wants back, and encodes steps with their priority.

Clients and hops both use it (spec/sessions/session.md).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.tensors import TensorHeader, encode_tensor
from peerd.protocol.errors import InvalidRequest, RemoteProtocolError
from peerd.protocol.messages.session import FEATURES, Step
from peerd.protocol.rows import DECODE_POSITIONS, RowSlice


def priority_of(positions: int) -> Priority:
    return Priority.DECODE if positions <= DECODE_POSITIONS else Priority.PREFILL


def header_of(step: Step, width: int) -> TensorHeader | None:
    """The header of a step's activations, `[positions, width]`; None for a step without rows.

    Raises InvalidRequest for a step that needs what we lack, or names a row twice, or has another shape;
    RemoteProtocolError for one without the tensor that its rows need.
    """
    missing = set(step.needs) - FEATURES
    if missing:
        raise InvalidRequest(f"this peer lacks {', '.join(sorted(missing))}")
    rows = [piece.row for piece in step.rows]
    if len(set(rows)) != len(rows):
        raise InvalidRequest("a step names each row at most once")
    if not rows:
        return None
    if step.tensor is None:
        raise RemoteProtocolError("a step with rows carries a tensor")
    header = TensorHeader.from_fields(step.tensor, max_elements=step.positions * width)
    if header.shape != (step.positions, width):
        raise InvalidRequest(f"activations of shape {header.shape}, not {(step.positions, width)}")
    return header


def wanted_rows(step: Step) -> tuple[RowSlice, ...]:
    """The positions of a step that its client wants back: all, each row's last, or none."""
    if step.want == "all":
        return step.rows
    if step.want == "none":
        return ()
    return tuple(RowSlice(piece.row, piece.end - 1, 1) for piece in step.rows)


def wanted_part(step: Step, hidden: torch.Tensor) -> torch.Tensor:
    """The part of a step's result, `[positions, width]`, that its client wants back."""
    if step.want == "all":
        return hidden
    if step.want == "none":
        return hidden[:0]
    return _cut(step.rows, tuple(piece.end - 1 for piece in step.rows), hidden)[1]


def encoded(
    step: Step, hidden: torch.Tensor, codec: str, dtype: torch.dtype
) -> tuple[dict[str, Any], list[memoryview]]:
    """The step's header and body as they travel. A step without rows has no tensor."""
    if not step.rows:
        return step.to_header(), []
    header, body = encode_tensor(hidden, codec=codec, dtype=dtype)
    return replace(step, tensor=header.to_fields()).to_header(), body


def _cut(
    rows: tuple[RowSlice, ...], starts: tuple[int, ...], hidden: torch.Tensor
) -> tuple[tuple[RowSlice, ...], torch.Tensor]:
    """For each slice of `rows`, the positions that begin at its entry in `starts`: their slices, and their part of
    `hidden`.
    """
    kept_rows = []
    kept = []
    offset = 0
    for piece, start in zip(rows, starts, strict=True):
        if start < piece.end:
            kept_rows.append(RowSlice(piece.row, start, piece.end - start))
            kept.append(hidden[offset + start - piece.start : offset + piece.count])
        offset += piece.count
    if len(kept) == 1:
        return tuple(kept_rows), kept[0]
    return tuple(kept_rows), torch.cat(kept) if kept else hidden[:0]
