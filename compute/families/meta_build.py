"""Builds Transformers modules without their weights, and then fills in the weights and buffers that are needed.

Every model is built whole on the meta device from the unmodified configuration, which costs no memory, and is cut
afterwards: in some families a configuration with fewer layers would build other layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peerd.compute.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_PLAIN_NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# No table is made of it.
_UNFILLED = float("nan")


def build_on_meta(
    model_type: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, attention: str | None = "eager"
) -> PreTrainedModel:
    """Build the whole model on the meta device, with a copy of the configuration, in evaluation mode.

    It has `dtype`, except for the parts that its family keeps in fp32. `attention` None chooses the best implementation
    that Transformers has for the family. Raises CheckpointError for a configuration that contradicts itself.
    """
    build: Any = model_type._from_config
    try:
        with torch.device("meta"):
            model: PreTrainedModel = build(copy.deepcopy(config), attn_implementation=attention, dtype=dtype)
    except (AssertionError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        # The configuration comes from a publisher, so the constructor may fail on it in many ways.
        raise CheckpointError(f"no {config.model_type} can be built from this configuration: {error}") from error
    model.train(False)
    _keep_in_fp32(model, dtype)
    return model


def _keep_in_fp32(model: Any, dtype: torch.dtype) -> None:
    """Return to fp32 the parts that a family keeps in fp32 whatever the dtype, such as a router's corrections.

    Transformers does this when it loads weights. Some parts are kept in fp32 only if the model has fp16, whose numbers
    end at 65504.
    """
    kept = set(model._keep_in_fp32_modules_strict or ()) if dtype != torch.float32 else set()
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    patterns = [re.compile(re.escape(pattern).replace(r"\*", ".*")) for pattern in kept]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and any(pattern.search(name) for pattern in patterns):
            tensor.data = tensor.data.to(torch.float32)


def fill(
    module: nn.Module,
    tensors: Iterable[tuple[str, torch.Tensor]],
    device: torch.device,
    where: object,
    *,
    prefix: str = "",
) -> None:
    """Replace meta parameters and buffers of `module` by tensors, each converted to the parameter's dtype.

    Parameters are frozen. Every name must be one that the module has. Raises CheckpointError, which puts `prefix`
    before the name, if a tensor has another shape or holds no plain numbers.
    """
    parameters = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, tensor in tensors:
        expected = parameters[name]
        check_tensor(f"{prefix}{name}", tensor, expected.shape, where)
        owner_name, _, leaf = name.rpartition(".")
        owner: Any = module.get_submodule(owner_name)
        value = tensor.to(device=device, dtype=expected.dtype)
        if isinstance(expected, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        setattr(owner, leaf, value)


def check_tensor(name: str, tensor: torch.Tensor, expected: Sequence[int], where: object) -> None:
    """Raise CheckpointError if a stored tensor contradicts the configuration.

    Quantized values are refused too: without their scales they mean nothing, whatever their shape.
    """
    if tensor.dtype not in _PLAIN_NUMBERS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{where}: tensor {name} is stored as {kind}, not as plain numbers: it is part of quantized"
            " weights that the configuration does not mention"
        )
    if tensor.shape != torch.Size(expected):
        raise CheckpointError(
            f"{where}: tensor {name} has shape {list(tensor.shape)}, the configuration says {list(expected)}"
        )


def compute_buffers(module: nn.Module, config: PreTrainedConfig, device: torch.device) -> None:
    """Compute the buffers that no checkpoint stores, such as rotary frequencies and Gemma's embedding scale."""
    for name, child in list(module.named_modules()):
        if type(child).__name__.endswith("RotaryEmbedding"):
            rotary: Any = type(child)
            # The child's own configuration comes first: Granite's blocks have rotary embeddings with several bases.
            with torch.device(device):
                module.set_submodule(name, rotary(config=getattr(child, "config", config)))
        elif hasattr(child, "scalar_embed_scale"):
            child.embed_scale = torch.tensor(child.scalar_embed_scale, device=device)
        else:
            _initialize_buffers(module, child, device)


def _initialize_buffers(model: Any, child: nn.Module, device: torch.device) -> None:
    """Let Transformers fill a module's own tables (sines of positions, causal masks), which no state dict contains.

    Raises UnsupportedModelError if it leaves one as it was: that would hold whatever the memory held before.
    """
    missing = [name for name in child._non_persistent_buffers_set if getattr(child, name).is_meta]
    if not missing:
        return
    for name in missing:
        table = getattr(child, name)
        setattr(child, name, torch.full_like(table, _UNFILLED if table.is_floating_point() else 0, device=device))
    for parameter in child.parameters(recurse=False):
        # Transformers' own mark for parameters that came from a checkpoint and must not be initialised again.
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    with torch.no_grad():
        model._init_weights(child)
        if any(map(_is_unfilled, (getattr(child, name) for name in missing))):
            # Falcon-H1's decoder fills tables of its blocks.
            model._init_weights(model)
    if unfilled := [name for name in missing if _is_unfilled(getattr(child, name))]:
        raise UnsupportedModelError(
            f"this release of Transformers does not say how to fill {type(child).__name__}.{unfilled[0]}"
        )


def _is_unfilled(table: torch.Tensor) -> bool:
    return table.is_floating_point() and bool(table.isnan().all())


def check_filled(module: nn.Module, where: object) -> None:
    """Raise CheckpointError if any parameter or buffer still has no value."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if missing := [name for name, tensor in tensors if tensor.is_meta]:
        rest = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: tensor {missing[0]} is missing{rest}")
