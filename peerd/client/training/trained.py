"""The tensors that a client trains beside frozen blocks, and their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from peerd.compute.adapters.lora import PREFIX_K, PREFIX_V, PROMPT
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.span import Span

LORA_A, LORA_B = ".lora_A", ".lora_B"

LoraPairs = Mapping[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
"""By (block, module inside the block, such as `self_attn.q_proj`): A `[r, in]` and B `[out, r]`."""

Prefixes = Mapping[int, tuple[torch.Tensor, torch.Tensor]]
"""By block: keys and values, each `[P, width of all key heads]`."""


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """The result of a backward in fp32: gradients with the shapes of their tensors; None for tensors that were not
    given.
    """

    hidden: torch.Tensor
    prompts: torch.Tensor | None
    lora: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
    prefixes: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """The tensors that are trained beside the frozen blocks.

    `prompts`: `[blocks, 1 or rows, P, width]`, added to the first P positions of each row at each block's input.
    `lora`: pairs that add `scaling * (x A^T) B^T` to the outputs of linear modules. `prefixes`: they take the place of
    the keys and values of each row's first P positions, whose inputs and outputs then mean nothing.
    """

    prompts: torch.Tensor | None = None
    lora: LoraPairs = field(default_factory=dict)
    scaling: float = 1.0
    prefixes: Prefixes = field(default_factory=dict)

    @property
    def has_row_prompts(self) -> bool:
        """Whether each row has its own prompt."""
        return self.prompts is not None and self.prompts.shape[1] > 1

    def parameters(self, blocks: Span, rows: Sequence[int]) -> dict[tuple[int, str], torch.Tensor]:
        """The tensors that lanes send for these rows of the pass, by (block, name)."""
        tensors: dict[tuple[int, str], torch.Tensor] = {}
        if self.prompts is not None:
            own = self.prompts[:, list(rows)] if self.has_row_prompts else self.prompts
            for index, prompt in enumerate(own.detach().float()):
                tensors[blocks.start + index, PROMPT] = prompt
        for (block, module), (down, up) in self.lora.items():
            tensors[block, module + LORA_A] = down.detach().float()
            # The scaling is multiplied into B, so that hops need not know it.
            tensors[block, module + LORA_B] = up.detach().float() * self.scaling
        for block, (keys, values) in self.prefixes.items():
            tensors[block, PREFIX_K], tensors[block, PREFIX_V] = keys.detach().float(), values.detach().float()
        return tensors

    def check(self, blocks: Span, rows: Sequence[int], width: int) -> None:
        """Raise InvalidRequest for tensors that do not fit the pass. Each hop checks that they fit its modules."""
        if self.prompts is not None:
            shape = tuple(self.prompts.shape)
            if len(shape) != 4 or shape[0] != len(blocks) or shape[1] not in (1, len(rows)) or shape[3] != width:
                raise InvalidRequest(
                    f"prompts of shape {list(shape)} instead of [{len(blocks)}, 1 or {len(rows)}, n, {width}]"
                )
            if not 1 <= shape[2] <= min(rows):
                raise InvalidRequest(f"prompts of {shape[2]} positions, and a row of {min(rows)}: rows include them")
            if not self.prompts.isfinite().all():
                raise InvalidRequest("the prompts have values that are not finite")
        for (block, module), pair in self.lora.items():
            if not blocks.start <= block < blocks.end:
                raise InvalidRequest(f"a LoRA pair for {module} of block {block}, which is not in {blocks}")
            if not all(matrix.isfinite().all() for matrix in pair):
                raise InvalidRequest(f"the LoRA pair for {module} of block {block} has values that are not finite")
        for block, prefix in self.prefixes.items():
            _check_prefix(block, prefix, blocks, rows)


def _check_prefix(block: int, prefix: tuple[torch.Tensor, torch.Tensor], blocks: Span, rows: Sequence[int]) -> None:
    if not blocks.start <= block < blocks.end:
        raise InvalidRequest(f"a prefix for block {block}, which is not in {blocks}")
    for matrix in prefix:
        if matrix.dim() != 2 or not 1 <= len(matrix) <= min(rows):
            raise InvalidRequest(
                f"the prefix of block {block} has shape {list(matrix.shape)}, not [P, width], P from 1 to"
                f" {min(rows)}: rows begin with its positions"
            )
        if not matrix.isfinite().all():
            raise InvalidRequest(f"the prefix of block {block} has values that are not finite")
