"""The LoRA pairs that peft has put beside remote blocks.

A pair is recognised by its attributes (a module with `lora_A`, `lora_B` and `scaling` around a base layer), so that
peft need not be installed. Every other kind of adapter on a remote block is refused by name: servers compute only
pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peerd.compute.adapters.lora import (
    PREFIX_K,
    PREFIX_V,
    PROMPT,
    BlockModule,
    DeepPrompt,
    LoraAdapter,
    LoraPair,
)
from peerd.facade.weights import RemoteWeight


@dataclass(frozen=True, slots=True, eq=False)
class LoraTensors:
    """One layer's active pairs combined: `a` `[rank, in]`, `b` `[out, rank]` times its scale. Both carry gradients."""

    a: torch.Tensor
    b: torch.Tensor
    module: Any

    def state(self) -> object:
        """A value that changes whenever the pair changes; cheap to compute."""
        module = self.module
        names = tuple(name for name in module.active_adapters if name in module.lora_A)
        versions = tuple(
            (module.lora_A[name].weight._version, module.lora_B[name].weight._version, module.scaling[name])
            for name in names
        )
        return names, module.disable_adapters, versions


Pairs = Mapping[BlockModule, LoraTensors]


def lora_of(layers: Sequence[Any]) -> dict[BlockModule, LoraTensors]:
    """The active pairs beside these remote blocks. Raises NotImplementedError for adapters of other kinds."""
    found: dict[BlockModule, LoraTensors] = {}
    for layer in layers:
        inside: tuple[str, ...] = ()
        for name, module in layer.named_modules():
            if inside and name.startswith(inside):
                continue
            if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
                inside += (f"{name}.",)
                pair = _pair(f"block {layer.index}: {name}", module)
                if pair is not None:
                    found[layer.index, name] = pair
            else:
                _refuse_others(layer.index, name, module)
    return found


def adapters_of(pairs: Pairs) -> set[str]:
    """The names of the adapters that these pairs are of."""
    return {name for pair in pairs.values() for name in pair.module.active_adapters}


def states(pairs: Pairs) -> list[object]:
    """Values that change when any of the pairs changes."""
    return [pair.state() for pair in pairs.values()]


def as_adapter(
    pairs: Pairs,
    first_block: int,
    deep: torch.Tensor | None,
    prefixes: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
) -> LoraAdapter | None:
    """The pairs as they are now, deep prompts `[blocks, positions, width]`, and prefixes by block, as an adapter for
    opening a session.

    None if there is nothing.
    """
    weights: dict[BlockModule, LoraPair | DeepPrompt] = {
        key: LoraPair(_values(pair.a), _values(pair.b), 1.0) for key, pair in pairs.items()
    }
    for block, values in enumerate(() if deep is None else deep, first_block):
        weights[block, PROMPT] = DeepPrompt(_values(values))
    for block, prefix in prefixes.items():
        for name, tensor in zip((PREFIX_K, PREFIX_V), prefix, strict=True):
            weights[block, name] = DeepPrompt(_values(tensor))
    return LoraAdapter(weights) if weights else None


def _values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu()


def _refuse_others(block: int, name: str, module: nn.Module) -> None:
    for leaf, parameter in module._parameters.items():
        if parameter is not None and not isinstance(parameter, RemoteWeight):
            raise NotImplementedError(
                f"block {block}: {type(module).__name__} {name or leaf} adapts a remote block in a way that servers do"
                " not compute. They compute LoRA pairs: use peft's LoraConfig, without use_dora"
            )


def _pair(where: str, module: Any) -> LoraTensors | None:
    if module.disable_adapters or getattr(module, "merged", False):
        return None
    down, up = [], []
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        _refuse_variants(where, adapter, module)
        down.append(module.lora_A[adapter].weight)
        up.append(module.lora_B[adapter].weight * module.scaling[adapter])
    if not down:
        return None
    a = down[0] if len(down) == 1 else torch.cat(down)
    b = up[0] if len(up) == 1 else torch.cat(up, 1)
    return LoraTensors(a, b, module)


def _refuse_variants(where: str, adapter: str, module: Any) -> None:
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if variant is not None:
        raise NotImplementedError(f"{where}: {type(variant).__name__} is more than a LoRA pair; use a plain LoraConfig")
    if getattr(module, "lora_bias", {}).get(adapter):
        raise NotImplementedError(f"{where}: servers compute no LoRA bias; set lora_bias=False")
    dropout = getattr(module.lora_dropout[adapter], "p", 0.0)
    if dropout and module.training:
        warnings.warn(f"{where}: lora_dropout={dropout} is not applied to remote blocks", stacklevel=2)
