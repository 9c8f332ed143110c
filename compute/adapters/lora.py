"""LoRA weights as values, and the sum that they add to a linear layer's output.

All functions are differentiable in every tensor that they take, so training uses them too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from peerd.compute.errors import AdapterError
from peerd.protocol.span import Span

# Adapters have ranks of 4 to 256. A rank costs as much for each position of the other sessions in a batch as for its
# own.
MAX_RANK = 1024

BlockModule = tuple[int, str]
"""A linear layer: the number of its block in the model, and its name in the block, such as `self_attn.q_proj`."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraPair:
    """The addition to one linear layer: `scale * b @ a @ x`.

    `a`: `[rank, in_features]`; `b`: `[out_features, rank]`; both of one floating dtype.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def n_values(self) -> int:
        return int(self.a.numel() + self.b.numel())

    @property
    def n_bytes(self) -> int:
        return int(self.a.nbytes + self.b.nbytes)

    @property
    def is_finite(self) -> bool:
        return bool(self.a.isfinite().all() and self.b.isfinite().all())

    def to(self, device: torch.device, dtype: torch.dtype) -> LoraPair:
        """The pair on `device`, rounded to `dtype`; gradients flow back to the original tensors."""
        return LoraPair(self.a.to(device, dtype), self.b.to(device, dtype), self.scale)


@dataclass(frozen=True, slots=True, eq=False)
class DeepPrompt:
    """Values for the first positions of each row in one block: `values` `[positions, width]`.

    In an adapter its key is the block's number and one of three names, none of which is a layer's. PROMPT: the values
    are added where the positions enter the block. PREFIX_K and PREFIX_V: they take the place of the keys or values of
    the block's attention, `width` being that of all its key heads together.
    """

    values: torch.Tensor

    @property
    def n_values(self) -> int:
        return int(self.values.numel())

    @property
    def n_bytes(self) -> int:
        return int(self.values.nbytes)

    @property
    def is_finite(self) -> bool:
        return bool(self.values.isfinite().all())

    def to(self, device: torch.device, dtype: torch.dtype) -> DeepPrompt:
        """The prompt on `device`, rounded to `dtype`."""
        return DeepPrompt(self.values.to(device, dtype))


PROMPT, PREFIX_K, PREFIX_V = "prompt", "prefix_k", "prefix_v"
Lora = Mapping[BlockModule, LoraPair | DeepPrompt]
"""The weights of an adapter, or those of some blocks: pairs, and deep prompts."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraAdapter:
    """An adapter in memory, from any source: checked, on the CPU, without gradients. Raises AdapterError.

    A client may use it in its own sessions. With deep prompts it can only be used in this way.
    """

    weights: Lora

    def __post_init__(self) -> None:
        checked = {key: _checked(key, value) for key, value in self.weights.items()}
        if not checked:
            raise AdapterError("an adapter without a matrix changes nothing: leave it out")
        object.__setattr__(self, "weights", checked)

    def __repr__(self) -> str:
        return f"<LoraAdapter modules={len(self.weights)} bytes={bytes_of(self.weights)}>"


def _checked(key: BlockModule, value: LoraPair | DeepPrompt) -> LoraPair | DeepPrompt:
    return _checked_prompt(key[0], value) if isinstance(value, DeepPrompt) else _checked_pair(key, value)


def _checked_prompt(block: int, prompt: DeepPrompt) -> DeepPrompt:
    values = prompt.values.detach().cpu()
    if values.dim() != 2 or not values.is_floating_point() or not values.numel() or not values.isfinite().all():
        raise AdapterError(
            f"block {block}: a deep prompt or prefix is [positions, width] of finite numbers, not {list(values.shape)}"
        )
    return DeepPrompt(values)


def _checked_pair(key: BlockModule, pair: LoraPair) -> LoraPair:
    a, b = pair.a.detach().cpu(), pair.b.detach().cpu()
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not pair.rank:
        raise AdapterError(f"block {key[0]}: {key[1]} has matrices {list(b.shape)} x {list(a.shape)} of no common rank")
    if not a.is_floating_point() or not b.is_floating_point() or not math.isfinite(pair.scale):
        raise AdapterError(f"block {key[0]}: {key[1]} has matrices of {a.dtype} and {b.dtype}, scale {pair.scale}")
    if not a.isfinite().all() or not b.isfinite().all():
        raise AdapterError(f"block {key[0]}: {key[1]} has a value that is not finite")
    return LoraPair(a, b, pair.scale)


def lora_delta(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """The addition to a linear layer's output for its input `x`, `[..., in_features]`: `[..., out_features]`."""
    return F.linear(F.linear(x, a) * scale, b)


def within(lora: Lora, blocks: Span) -> dict[BlockModule, LoraPair | DeepPrompt]:
    """The part of an adapter that belongs to `blocks`."""
    return {key: value for key, value in lora.items() if blocks.start <= key[0] < blocks.end}


def bytes_of(lora: Lora, dtype: torch.dtype | None = None) -> int:
    """The bytes of the weights; once they are in `dtype`, if that is given."""
    if dtype is None:
        return sum(value.n_bytes for value in lora.values())
    return sum(value.n_values * dtype.itemsize for value in lora.values())


def check_fits(
    lora: Lora,
    features: Mapping[BlockModule, tuple[int, int]],
    width: int,
    caches: Mapping[int, tuple[int, int] | None],
) -> None:
    """Raise AdapterError unless every pair fits a layer of `features`, which gives (out_features, in_features).

    Deep prompts must be as wide as the hidden states, `width`, and prefixes as what `caches` gives: the widths of a
    block's keys and of its values; None if prefixes cannot take their place.
    """
    for (block, name), pair in lora.items():
        if isinstance(pair, DeepPrompt):
            _check_width(block, name, pair.values.shape[1], width, caches.get(block))
            continue
        if pair.rank > MAX_RANK:
            raise AdapterError(f"block {block}: {name} has an adapter of rank {pair.rank}, more than {MAX_RANK}")
        wanted = features.get((block, name))
        if wanted is None:
            raise AdapterError(f"block {block} has no linear layer {name} that can be adapted")
        if (pair.a.shape, pair.b.shape) != ((pair.rank, wanted[1]), (wanted[0], pair.rank)):
            got = f"{list(pair.b.shape)} x {list(pair.a.shape)}"
            raise AdapterError(f"block {block}: {name} maps {wanted[1]} to {wanted[0]} values, not {got}")


def _check_width(block: int, name: str, found: int, width: int, cache: tuple[int, int] | None) -> None:
    if name == PROMPT:
        if found != width:
            raise AdapterError(f"block {block}: a deep prompt {found} wide, the model is {width} wide")
        return
    if cache is None:
        raise AdapterError(f"block {block} takes no {name}: its attention caches no plain keys and values")
    wanted = cache[name == PREFIX_V]
    if found != wanted:
        raise AdapterError(f"block {block}: a {name} {found} wide, its heads together are {wanted} wide")
