"""Sketches of hidden states: a few numbers a position, by which two results can be compared at a distance.

A sketch holds sums of all values of a position, each value with a sign that follows from a secret seed. The length of
the difference of two sketches is on average that of the difference of what they were made from, times a constant. So
`distance` compares sketches as it does hidden states. Who does not know the seed cannot make other values with the same
sketch: for random signs, sums of a difference that was chosen without them are as large as the difference is
(Alon, Matias, Szegedy, "The space complexity of approximating the frequency moments", 1996).
"""

from __future__ import annotations

from hashlib import shake_256

import numpy as np
import torch

from peerd.protocol.messages.audits import SKETCH_SIZE

# Two peers add the same numbers up in another order.
_ROUNDING = 1e-3
# By how much a distance of sketches may exceed that of what they were made from: they have 16 numbers a position, whose
# lengths vary by a sixth, and a distance is a quotient of two lengths.
SLACK = 1.5
# What has nothing to do with what a hop should have sent is at a distance of 1 or more: a limit beyond that, as two
# servers of coarse numerics have it, would let everything pass.
_UNRELATED = 0.9


class Sketcher:
    """Makes sketches of positions `width` wide under one or more seeds."""

    def __init__(self, seeds: tuple[bytes, ...], width: int) -> None:
        # One byte a sign: a session keeps them, and in float32 they would be four times as large.
        self._signs = torch.cat([signs(seed, width) for seed in seeds], dim=1)

    def __repr__(self) -> str:
        return f"<Sketcher {tuple(self._signs.shape)}>"

    def sketch(self, hidden: torch.Tensor) -> torch.Tensor:
        """The sketches of `[positions, width]` on the CPU: `[positions, seeds x SKETCH_SIZE]`, float32, finite."""
        sums = hidden.float() @ self._signs.float()
        return sums.nan_to_num_()


def signs(seed: bytes, width: int) -> torch.Tensor:
    """The signs of a seed, `[width, SKETCH_SIZE]`: bit number `16 i + j` of SHAKE-256 over the seed, the lowest of a
    byte first, says whether value i counts as itself (1) or negated (0) in sum j.
    """
    bits = np.unpackbits(np.frombuffer(shake_256(seed).digest(width * SKETCH_SIZE // 8), np.uint8), bitorder="little")
    return torch.from_numpy(bits.astype(np.int8) * 2 - 1).view(width, SKETCH_SIZE)


def sketched_limit(limit: float) -> float:
    """How far apart the sketches of two honest results may be that are themselves at most `limit` apart."""
    return min(SLACK * limit, _UNRELATED)


def are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two sketches under one seed, `[positions, SKETCH_SIZE]`, were made from the same values."""
    apart, size = (one - other).norm(dim=1), torch.maximum(one.norm(dim=1), other.norm(dim=1))
    return bool((apart <= _ROUNDING * size).all())
