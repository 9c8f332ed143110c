"""How far apart two results of the same blocks are.

Compared is what the blocks added to their input, never their output itself: most of an output is the input that was
passed on, beside which a skipped block is as small as rounding.
"""

from __future__ import annotations

import torch

# The first position of a row is a thousand times as large in many models ("attention sink"), so that its rounding
# says nothing of the others.
FIRST_POSITION = 1
# A quarter of the positions may lie further apart than the distance: a few positions are far apart between honest
# servers too, where a block's result is the small difference of large numbers.
QUANTILE = 0.75
# With fewer positions than this, chance alone moves the quantile too far.
MIN_POSITIONS = 16


def distance(inputs: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> float:
    """How far apart two outputs for the same inputs are, relative to what the blocks added; all `[positions, width]`.

    0 means equal; a server that returns its input, or something unrelated, is about 1 or more away from an honest one.
    Infinite if a value is not finite.
    """
    inputs, one, other = inputs.float(), one.float(), other.float()
    apart = (one - other).norm(dim=1)
    added = torch.maximum((one - inputs).norm(dim=1), (other - inputs).norm(dim=1))
    relative = torch.where(apart == 0, 0.0, apart / added)
    found = float(relative.quantile(QUANTILE))
    return found if found == found else float("inf")
