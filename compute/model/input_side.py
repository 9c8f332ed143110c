"""Takes off a decoder what its forward does to input embeddings before the first block.

Granite multiplies them, Bloom norms them, GPT-2 adds a row of positions, OPT also widens them. All of that moves to
the head, so that the decoder's input is the input of its first block, wherever that block lies in the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peerd.compute.families.family import Family


@dataclass(frozen=True, slots=True)
class InputSide:
    """The removed parts, in the order in which they apply."""

    scale: float
    project: nn.Module | None
    #: Its table holds one row for each position, after `position_offset` rows of another use.
    positions: nn.Module | None
    position_offset: int
    norm: nn.Module

    @property
    def max_positions(self) -> int | None:
        """How many positions have rows; None if positions are not part of the embedding."""
        return None if self.positions is None else len(_table(self.positions)) - self.position_offset

    def __call__(self, embedded: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The first block's input, for rows of the embedding table [n, embedding width] at absolute `positions` [n]."""
        # Multiplying by 1 is exact.
        hidden = embedded * self.scale
        if self.project is not None:
            hidden = self.project(hidden)
        if self.positions is not None:
            rows = positions.to(hidden.device) + self.position_offset
            hidden = hidden + nn.functional.embedding(rows, _table(self.positions))
        result: torch.Tensor = self.norm(hidden)
        return result


def take_off_input_side(decoder: PreTrainedModel, family: Family) -> InputSide:
    """Remove the treatment of input embeddings from `decoder`, and return it."""
    parts: Any = decoder
    scale, norm, positions, project = 1.0, nn.Identity(), None, None
    if family.embedding_scale:
        scale = float(getattr(parts, family.embedding_scale))
        setattr(parts, family.embedding_scale, 1.0)
    if family.root_scale_switch and getattr(decoder.config, family.root_scale_switch):
        scale = float(decoder.config.hidden_size) ** 0.5
        setattr(decoder.config, family.root_scale_switch, False)
    if family.embedding_norm:
        norm = getattr(parts, family.embedding_norm)
        # A norm that is also the final norm stays there too. It has no weights, so applying it twice changes nothing.
        if family.embedding_norm != family.norm:
            setattr(parts, family.embedding_norm, nn.Identity())
    if family.positions:
        positions = getattr(parts, family.positions)
        setattr(parts, family.positions, _NoPositions())
    if family.project_in:
        project = getattr(parts, family.project_in)
        setattr(parts, family.project_in, None)
    return InputSide(scale, project, positions, family.position_offset, norm)


def _table(positions: Any) -> torch.Tensor:
    """The table: an embedding's weight for learned positions; XGLM computes its own."""
    table: torch.Tensor = positions.weights if hasattr(positions, "weights") else positions.weight
    return table


class _NoPositions(nn.Module):
    """Replaces a table of positions: adds nothing and changes no dtype."""

    def forward(self, *_: object, **__: object) -> torch.Tensor:
        return torch.zeros(())
