"""Which linear layers of a span an adapter can stand beside, and their sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peerd.compute.adapters.lora import BlockModule
from peerd.compute.families.layer_kinds import LayerKind

if TYPE_CHECKING:
    from peerd.compute.model.span_model import SpanModel

# The positions of the forward that finds the layers that see every position once.
_PROBE_POSITIONS = 3


def features(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of any linear module: Linear, its packed and quantized forms, and GPT-2's Conv1D."""
    if hasattr(module, "nf"):
        weight: Any = module.weight
        return int(weight.shape[1]), int(weight.shape[0])
    sizes: Any = module
    return int(sizes.out_features), int(sizes.in_features)


def _is_linear(module: nn.Module) -> bool:
    if type(module).__name__ == "Conv1D":
        return hasattr(module, "nf")
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def linear_layers(
    layers: Iterable[nn.Module], kinds: Iterable[LayerKind], first_block: int = 0
) -> dict[BlockModule, nn.Module]:
    """The linear layers beside which an adapter can stand, whatever device they are on, by block and name."""
    found: dict[BlockModule, nn.Module] = {}
    for number, (layer, kind) in enumerate(zip(layers, kinds, strict=True), first_block):
        for name, module in layer.named_modules():
            parts = name.split(".")
            # Experts see only the positions routed to them. Cached latents are expanded for one whole row at a time, or
            # not at all (`attention.latent`).
            beside_batch = "experts" in parts or (kind.latent and parts[-1] == "kv_b_proj")
            if name and _is_linear(module) and not beside_batch:
                found[number, name] = module
    return found


def position_wise(model: SpanModel) -> dict[BlockModule, nn.Module]:
    """The linear layers that see each position exactly once, in order: found out by running some."""
    seen: dict[BlockModule, list[tuple[int, int]]] = {}
    found = linear_layers(model.layers, model.kinds, model.span.start)
    handles = [module.register_forward_hook(_watcher(seen.setdefault(key, []))) for key, module in found.items()]
    try:
        with torch.inference_mode():
            model.forward_no_cache(
                torch.zeros(1, _PROBE_POSITIONS, model.hidden_size, device=model.device, dtype=model.dtype)
            )
    finally:
        for handle in handles:
            handle.remove()
    return {
        key: module
        for key, module in found.items()
        if seen[key] == [(_PROBE_POSITIONS * features, _PROBE_POSITIONS * out) for out, features in [features(module)]]
    }


def _watcher(seen: list[tuple[int, int]]) -> Any:
    def watch(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.append((inputs[0].numel(), output.numel()))

    return watch
