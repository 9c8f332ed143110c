"""Cuts rows of hidden states into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch

from peerd.protocol.errors import InvalidRequest
from peerd.protocol.messages.training import MAX_PASS_POSITIONS, MAX_PASS_ROWS

# Micro-batches for each hop of a chain. With four, hops wait for each other a fifth of the time instead of a half.
MICRO_BATCHES_A_HOP = 4


# A single hop waits for no other: one micro-batch computes while another travels.
MICRO_BATCHES_ALONE = 2


# Smaller micro-batches compute no faster, on any device.
LEAST_POSITIONS = 256


def as_rows(
    inputs: torch.Tensor | Sequence[Sequence[int]],
    rows: Sequence[int] | None,
    embed: Callable[[Sequence[int]], torch.Tensor],
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Hidden states and the lengths of their rows, from hidden states or token ids. Raises InvalidRequest."""
    if isinstance(inputs, torch.Tensor) and inputs.is_floating_point():
        if rows is None and inputs.dim() == 3:
            return inputs, (inputs.shape[1],) * inputs.shape[0]
        if rows is None or inputs.dim() != 2 or not len(rows):
            raise InvalidRequest("hidden states are [rows, positions, width], or [sum of rows, width] with `rows`")
        return inputs, tuple(rows)
    ids = inputs.tolist() if isinstance(inputs, torch.Tensor) else [list(row) for row in inputs]
    if not ids or not all(isinstance(row, list) and row for row in ids):
        raise InvalidRequest("token ids are rows of at least one each")
    hidden = torch.cat([embed(row) for row in ids])
    lengths = tuple(len(row) for row in ids)
    if isinstance(inputs, torch.Tensor):
        return hidden.view(len(ids), lengths[0], -1), lengths
    return hidden, lengths


Part = tuple[tuple[int, ...], tuple[int, ...], int]
"""Some consecutive rows of a pass: their numbers, their lengths, and the first one's first position."""


def cut(lengths: Sequence[int], most: int, within: range | None = None) -> list[Part]:
    """Groups of consecutive rows with at most `most` positions, or one row. `within`: the numbers of the rows that are
    cut; None: all of them.
    """
    offsets = list(accumulate(lengths, initial=0))
    groups: list[list[int]] = []
    for number in range(len(lengths)) if within is None else within:
        length = lengths[number]
        last = groups[-1] if groups else []
        taken = sum(lengths[other] for other in last)
        if last and taken + length <= most and len(last) < MAX_PASS_ROWS:
            last.append(number)
        else:
            groups.append([number])
    return [(tuple(group), tuple(lengths[number] for number in group), offsets[group[0]]) for group in groups]


def positions_each(positions: int, hops: int) -> int:
    """How many positions a micro-batch should have, so that `hops` hops are all busy."""
    count = MICRO_BATCHES_A_HOP * hops if hops > 1 else MICRO_BATCHES_ALONE
    return min(MAX_PASS_POSITIONS, max(LEAST_POSITIONS, -(-positions // count)))


def split(lengths: Sequence[int], shares: Sequence[int]) -> list[range]:
    """The numbers of the rows that each of several chains gets: consecutive rows, with positions in proportion to
    `shares`. With few rows some chains get none.
    """
    begins = [0]
    ends = list(accumulate(lengths))
    for share in accumulate(shares):
        wanted = ends[-1] * share / sum(shares)
        # A row goes to the chain whose share its middle falls into.
        begins.append(sum(end - length / 2 <= wanted for end, length in zip(ends, lengths, strict=True)))
    return [range(begin, end) for begin, end in pairwise(begins)]
