"""The tensors that a client trains beside a span's frozen weights: deep prompts, prefixes and LoRA pairs.

A deep prompt of P positions is added to the first P positions of each row of its block's input. A prefix takes the
place of the keys or values of those positions in the block's attention. A LoRA pair (A `[r, in]`, B `[out, r]`) adds
`scaling * (x A^T) B^T` to the output of one of the block's linear modules. All are attached to a block for one call
only, so that clients' tensors never mix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peerd.compute.adapters.lora import MAX_RANK, PREFIX_K, PREFIX_V, PROMPT
from peerd.compute.attention.attention import Prefix, with_prefix
from peerd.compute.errors import InvalidStepError

LORA_A, LORA_B = ".lora_A", ".lora_B"
_PREFIXES = (PREFIX_K, PREFIX_V)
_FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class BlockShapes:
    """What tensors beside one block must fit: its linear modules by name with the widths of their inputs and outputs,
    the width of hidden states, and those of its keys and values (None: prefixes cannot take their place).
    """

    linears: Mapping[str, tuple[int, int]]
    hidden_size: int
    cache: tuple[int, int] | None

    @property
    def most_tensors(self) -> int:
        """How many tensors can stand beside the block: a pair for each linear module, a prompt, and a prefix."""
        return 2 * len(self.linears) + 3

    def prefix_width(self, name: str) -> int:
        """The width of `prefix_k` or `prefix_v`. Raises InvalidStepError."""
        if self.cache is None:
            raise InvalidStepError(f"the block takes no {name}: its attention caches no plain keys and values")
        return self.cache[name == PREFIX_V]


@dataclass(frozen=True, slots=True, eq=False)
class Tunables:
    """Tensors by (block, name), on the CPU: `prompt`, `prefix_k`, `prefix_v`, `<module>.lora_A`, `<module>.lora_B`.

    Prompts are `[1 or rows, P, hidden_size]`, prefixes `[P, width of all key heads]`. Modules have their names inside
    the block: `self_attn.q_proj`.
    """

    tensors: Mapping[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    scaling: float = 1.0

    def check(self, shapes: Mapping[int, BlockShapes], rows: Sequence[int]) -> None:
        """Check that the tensors fit these blocks and rows. Raises InvalidStepError naming the one that does not."""
        for (block, name), tensor in self.tensors.items():
            if block not in shapes:
                raise InvalidStepError(f"{name} is for block {block}, which this pass does not run")
            if name == PROMPT:
                _check_prompt(block, tensor, rows, shapes[block].hidden_size)
            elif name in _PREFIXES:
                check_shape(name, tensor.shape, shapes[block])
                _check_positions(f"{name} of block {block}", len(tensor), rows)
            else:
                self._check_lora(block, name, tensor, shapes[block].linears)

    @property
    def leaves_bytes(self) -> int:
        """What their copies with gradients (`BlockLeaves`) take, in fp32, without the gradients."""
        return _FP32_BYTES * sum(tensor.numel() for tensor in self.tensors.values())

    def working_bytes(self) -> tuple[int, int]:
        """What they take on the device beside a pass: once, and for each position of a micro-batch.

        Each is there with its gradient, both in fp32. A block's LoRA pairs keep their inner values and their inputs in
        fp32 for the backward.
        """
        once = 2 * self.leaves_bytes
        by_block: dict[int, int] = {}
        for (block, name), tensor in self.tensors.items():
            if tensor.dim() == 2 and name not in _PREFIXES:
                # Of A [r, in] the input and the inner values; of B [out, r] the inner values' gradient and the sum.
                by_block[block] = by_block.get(block, 0) + sum(tensor.shape)
        return once, 2 * _FP32_BYTES * max(by_block.values(), default=0)

    def _check_lora(self, block: int, name: str, tensor: torch.Tensor, known: Mapping[str, tuple[int, int]]) -> None:
        module_name, suffix = name[: -len(LORA_A)], name[-len(LORA_A) :]
        other = self.tensors.get((block, module_name + (LORA_B if suffix == LORA_A else LORA_A)))
        widths = known.get(module_name)
        if suffix not in (LORA_A, LORA_B) or widths is None:
            raise InvalidStepError(f"block {block} has no {name!r}: LoRA goes beside {', '.join(sorted(known))}")
        if other is None or tensor.dim() != 2 or other.dim() != 2:
            raise InvalidStepError(f"block {block}: {module_name} needs a matrix {LORA_A[1:]} and one {LORA_B[1:]}")
        wide_in, wide_out = widths
        expected = [other.shape[1], wide_in] if suffix == LORA_A else [wide_out, other.shape[0]]
        if list(tensor.shape) != expected:
            raise InvalidStepError(f"block {block}: {name} has shape {list(tensor.shape)}, not {expected}")


def _check_prompt(block: int, tensor: torch.Tensor, rows: Sequence[int], hidden_size: int) -> None:
    if tensor.dim() != 3 or tensor.shape[0] not in (1, len(rows)) or tensor.shape[2] != hidden_size:
        raise InvalidStepError(
            f"the prompt of block {block} has shape {list(tensor.shape)}, not [1 or {len(rows)}, n, {hidden_size}]"
        )
    _check_positions(f"the prompt of block {block}", tensor.shape[1], rows)


def _check_positions(what: str, count: int, rows: Sequence[int]) -> None:
    if count > min(rows):
        raise InvalidStepError(f"{what} has {count} positions, a row only {min(rows)}: rows begin with its positions")


def check_shape(name: str, shape: Sequence[int], block: BlockShapes) -> None:
    """Whether a tensor of this name and shape belongs to such a block. Raises InvalidStepError.

    What `Tunables.check` refuses later need not be received first.
    """
    if name == PROMPT:
        if len(shape) != 3 or shape[2] != block.hidden_size:
            raise InvalidStepError(f"a prompt of shape {list(shape)} is not [1 or rows, n, {block.hidden_size}]")
        return
    if name in _PREFIXES:
        width = block.prefix_width(name)
        if len(shape) != 2 or shape[1] != width:
            raise InvalidStepError(f"a {name} of shape {list(shape)} is not [n, {width}]")
        return
    known = block.linears
    module_name, suffix = name[: -len(LORA_A)], name[-len(LORA_A) :]
    widths = known.get(module_name)
    if suffix not in (LORA_A, LORA_B) or widths is None:
        raise InvalidStepError(f"the block has no {name!r}: LoRA goes beside {', '.join(sorted(known))}")
    rank = shape[0] if suffix == LORA_A else shape[-1]
    wanted = [rank, widths[0]] if suffix == LORA_A else [widths[1], rank]
    if list(shape) != wanted or rank > MAX_RANK:
        raise InvalidStepError(f"{name} has shape {list(shape)}, not {wanted} with a rank of {MAX_RANK} at most")


def linear_widths(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """The block's linear modules by name, each with the widths of its input and its output."""
    found = {}
    for name, module in layer.named_modules():
        wide_in, wide_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(wide_in, int) and isinstance(wide_out, int):
            found[name] = (wide_in, wide_out)
    return found


@dataclass(slots=True, eq=False)
class BlockLeaves:
    """One block's tunables on its device, as leaf tensors that get gradients."""

    prompt: torch.Tensor | None = None
    prefix: Prefix = (None, None)
    lora: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    scaling: float = 1.0

    @classmethod
    def of(cls, tunables: Tunables, block: int, device: torch.device) -> BlockLeaves:
        own = {
            name: tensor.detach().to(device, torch.float32, copy=True).requires_grad_()
            for (of_block, name), tensor in tunables.tensors.items()
            if of_block == block
        }
        modules = [name.removesuffix(LORA_A) for name in own if name.endswith(LORA_A)]
        lora = {name: (own[name + LORA_A], own[name + LORA_B]) for name in modules}
        return cls(own.get(PROMPT), (own.get(PREFIX_K), own.get(PREFIX_V)), lora, tunables.scaling)

    def named(self) -> dict[str, torch.Tensor]:
        """All leaves by name."""
        first = zip((PROMPT, *_PREFIXES), (self.prompt, *self.prefix), strict=True)
        prompts = {name: leaf for name, leaf in first if leaf is not None}
        down = {name + LORA_A: pair[0] for name, pair in self.lora.items()}
        up = {name + LORA_B: pair[1] for name, pair in self.lora.items()}
        return prompts | down | up


def with_prompt(hidden: torch.Tensor, prompt: torch.Tensor | None, rows: Sequence[int]) -> torch.Tensor:
    """`[rows, positions, width]` with a prompt added to its first positions. `rows`: the rows' numbers in the pass."""
    if prompt is None:
        return hidden
    own = prompt if prompt.shape[0] == 1 else prompt[list(rows)]
    count = prompt.shape[1]
    return torch.cat((hidden[:, :count] + own.to(hidden.dtype), hidden[:, count:]), dim=1)


@contextmanager
def with_leaves(layer: nn.Module, leaves: BlockLeaves) -> Iterator[None]:
    """Inside this context, the block's linear modules add their LoRA pairs, and its attention has the prefix."""
    handles = []
    try:
        for name, pair in leaves.lora.items():
            handles.append(layer.get_submodule(name).register_forward_hook(_adding(*pair, leaves.scaling)))
        with with_prefix(layer, leaves.prefix):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(down: torch.Tensor, up: torch.Tensor, scaling: float) -> Any:
    def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        # In fp32, as LoRA is trained: bf16 would lose small steps.
        delta = (inputs[0].to(down.dtype) @ down.T) @ up.T
        return output + (delta * scaling).to(output.dtype)

    return add
