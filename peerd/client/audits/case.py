"""An answer that is to be checked: what was sent, what came back, and which servers computed it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peerd.client.finding.served_by import ServedBy
from peerd.client.session.opener import Terms
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One row of a session over `blocks`, on `terms`.

    inputs: the hidden states that were sent, `[length, width]`. positions, results: for which positions results came
    back, and the results, `[len(positions), width]`. chain: the servers.
    """

    blocks: Span
    terms: Terms
    inputs: torch.Tensor
    positions: tuple[int, ...]
    results: torch.Tensor
    chain: tuple[ServedBy, ...]

    @property
    def peers(self) -> frozenset[PeerId]:
        """The servers."""
        return frozenset(served.peer for served in self.chain)
