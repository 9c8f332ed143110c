"""Decides how each matrix of a block is stored, for loading it and for counting its memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from peerd.compute.quantized.formats import FORMATS, NONE, PACKED
from peerd.compute.quantized.groups import GroupForm, group_form
from peerd.compute.quantized.modules import AnyForm, Quantizable, matrices_of, quantizables

if TYPE_CHECKING:
    from peerd.compute.checkpoint.checkpoint import Checkpoint

# Attention over latents multiplies by this weight itself (attention/latent.py). Packed, it could not, and every decode
# would expand the whole past.
_MULTIPLIED = ".kv_b_proj.weight"


def forms_of(
    layer: nn.Module, checkpoint: Checkpoint, prefix: str, quantize: str
) -> dict[str, tuple[Quantizable, AnyForm]]:
    """The parameters of a block that are not stored plain, by name, each with its format.

    `prefix` stands before the names in the checkpoint. Raises UnsupportedModelError, and KeyError for an unknown
    `quantize`.
    """
    if quantize == NONE:
        return {}
    if quantize != PACKED:
        return {name: (target, FORMATS[quantize]) for name, target in quantizables(layer).items()}
    found: dict[str, tuple[Quantizable, AnyForm]] = {}
    for name, target in matrices_of(layer).items():
        if (form := _group_form(checkpoint, f"{prefix}{name}", target)) is not None:
            found[name] = (target, form)
    return found


def packing_notes(checkpoint: Checkpoint, first: int, layers: Iterable[nn.Module], quantize: str) -> list[str]:
    """What an operator should know about packed weights: which of them are rounded, and which are plain.

    `layers` are loaded blocks, of which the first has the number `first`.
    """
    if quantize != PACKED:
        return []
    rounded, plain = set[str](), set[str]()
    for block, layer in enumerate(layers, first):
        grids = map(checkpoint.grid, checkpoint.names_of_block(block))
        rounded |= {grid.stored_as for grid in grids if grid is not None and not grid.exact}
        plain |= set(matrices_of(layer))
    notes = []
    if rounded:
        notes.append(
            f"{', '.join(sorted(rounded))} weights have no scale for 32 neighbours: rounded to 8 bits in groups of 32"
        )
    if plain:
        notes.append(f"not stored as integers in groups, so kept plain: {', '.join(sorted(plain))}")
    return notes


def has_grids(checkpoint: Checkpoint) -> bool:
    """Whether any matrix of the model can be kept in the integers in which it is stored."""
    return any(checkpoint.grid(name) is not None for name in checkpoint.names_of_block(0))


def _group_form(checkpoint: Checkpoint, parameter: str, target: Quantizable) -> GroupForm | None:
    if parameter.endswith(_MULTIPLIED):
        return None
    grid = checkpoint.grid(parameter)
    if grid is None or grid.transposed != target.transposed or target.columns % grid.group:
        return None
    return group_form(grid.bits, grid.group)
