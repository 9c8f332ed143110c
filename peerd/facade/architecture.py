"""Turns an architecture's own class into a remote one: its type, dtype, masks, and how its decoder calls layers."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from peerd.facade.blocks import Call, RemoteBlocks, during
from peerd.protocol.encoding.tensors import DTYPES

if TYPE_CHECKING:
    from peerd.compute.families.family import Family

# Remote blocks need no masks, but some decoders compute with the mask that they make; they get one of one element.
_NO_MASKS = "peerd_remote"


def dtype_named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """`torch.bfloat16`, "bfloat16" or "torch.bfloat16"; None, and "auto", for the checkpoint's own.

    Raises ValueError for others than float32, bfloat16 and float16.
    """
    if dtype is None or dtype == "auto":
        return None
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype={dtype!r}: the head computes in one of {', '.join(DTYPES)}, or leave it out")
    return found


_TYPES: dict[tuple[type, type], type[Any]] = {}


def remote_type(mixin: type, kind: type) -> type[Any]:
    """The architecture's class with remote blocks. It keeps its name, by which libraries recognise it."""
    if (mixin, kind) not in _TYPES:
        body = {"__module__": kind.__module__}
        if hasattr(kind, "prepare_inputs_for_generation"):
            body["prepare_inputs_for_generation"] = _preparing(kind.prepare_inputs_for_generation)
        _TYPES[mixin, kind] = type(kind.__name__, (mixin, kind), body)
    return _TYPES[mixin, kind]


def _preparing(original: Any) -> Any:
    """`prepare_inputs_for_generation` for batches that are padded on the right, and for a model that peft may wrap.

    Transformers counts the positions of a row's new tokens on from the padding before them; they are corrected here.

    peft 0.21 puts a method of its own in its place and knows the cache only as `past_key_values`: without it, peft
    would give its prompts again with every token. The causal model's pre-hook names the cache back.
    """

    # Transformers reads the signature.
    @functools.wraps(original)
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = original(self, *args, **kwargs)
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if isinstance(mask, torch.Tensor) and positions is not None and _is_padded_behind(mask):
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -positions.shape[-1] :]
        if "prepare_inputs_for_generation" in self.__dict__ and "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    return prepare_inputs_for_generation


def _is_padded_behind(mask: torch.Tensor) -> bool:
    """Whether padding follows a token in some row of `[rows, columns]`."""
    return mask.dim() == 2 and bool((mask[:, 1:] < mask[:, :-1]).any())


def use_no_masks(config: Any) -> None:
    """Let the model of this configuration make masks of one element, because remote blocks need none."""
    from transformers import AttentionMaskInterface

    AttentionMaskInterface.register(_NO_MASKS, _one_element_mask)
    config._attn_implementation = _NO_MASKS


def _one_element_mask(*_: Any, **__: Any) -> torch.Tensor:
    return torch.ones(1, 1, 1, 1, dtype=torch.bool)


def find_return_type(decoder: Any, layers: RemoteBlocks, family: Family) -> None:
    """Find out whether the decoder's loop expects tuples of its layers, by a run with layers that do nothing.

    Few families do, of one element or of two, and a release may change that, so they are asked instead of listed.
    Raises TypeError.
    """
    ids = torch.zeros(2, 3, dtype=torch.long, device=getattr(decoder, family.embeddings).weight.device)
    failure: Exception | None = None
    for others in (None, 0, 1):
        blocks: list[Any] = list(layers)
        for block in blocks:
            block.others = others
        try:
            with during(Call((), is_dry=True)), torch.no_grad():
                output = type(decoder).forward(decoder, input_ids=ids, use_cache=False)
            if output.last_hidden_state.shape[:2] == ids.shape:
                return
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            failure = error
    raise TypeError(
        f"{type(decoder).__name__} calls its layers in a way that remote blocks do not support"
    ) from failure
