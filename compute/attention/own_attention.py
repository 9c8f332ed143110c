"""Attention of families outside Transformers' `AttentionInterface`, such as Bloom, Falcon, MPT and GPT-J.

Their modules compute attention themselves, for rows of one length. GPT-J and its like do so in a method, which is
replaced; of Bloom, Falcon and MPT the `forward` is written again around the modules' own projections. Both pass
queries, keys and values to the interface, so that batches of many sessions work. The rest of these families stays
Transformers'.

ALiBi favours near keys by a number for each head and position. It depends on the key alone (softmax removes what all
keys of a query have in common), so one table serves every row. Transformers' own functions make and round it.
"""

from __future__ import annotations

import importlib
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from peerd.compute.families.family import Family
from peerd.compute.transformers_compat import alibi_slopes, take_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A table is made for this many positions, or for twice as many as are needed.
_FIRST_LENGTH = 2048
_NO_MASK = "peerd_no_mask"


class KeyBias:
    """A number added to each key's score, by head and position. `make(length)` gives `[heads, length]`."""

    def __init__(self, make: Callable[[int], torch.Tensor], *, from_end: bool = False) -> None:
        self._make = make
        # Whether positions count backwards from a row's last key.
        self._from_end = from_end
        self._table: torch.Tensor | None = None

    @cached_property
    def slopes(self) -> torch.Tensor:
        """By how much a key is favoured over the one before it, fp32 `[heads]`: tables are linear in the position."""
        with torch.inference_mode(False), torch.no_grad():
            return self(0, 2).float().diff(dim=1).squeeze(1)

    def __call__(self, start: int, end: int) -> torch.Tensor:
        """The numbers for the keys at `start` to `end - 1`, of rows that end there: `[heads, end - start]`."""
        table = self._table
        if table is None or table.shape[1] < end:
            # Not as an inference tensor, which a training pass could not use later.
            with torch.inference_mode(False), torch.no_grad():
                table = self._table = self._make(max(_FIRST_LENGTH, 2 * end))
        shift = table.shape[1] - end if self._from_end else 0
        return table[:, start + shift : end + shift]


def needs_own_attention(family: Family) -> bool:
    """Whether this release of Transformers leaves the family's attention outside `AttentionInterface`.

    A release may bring a family into the interface, as 5.24 did with GPT-J and CodeGen: then the method to be
    replaced does not exist, and nothing has to be done.
    """
    if not family.own_attention:
        return False
    modeling = importlib.import_module(family.decoder_type().__module__)
    name, method = _REPLACED[family.model_type]
    attention: Any = getattr(modeling, name)
    return hasattr(attention, method)


def install_own_attention(decoder: PreTrainedModel, attention: str, device: torch.device, dtype: torch.dtype) -> None:
    """Make a decoder's attention modules call `attention`, a name registered with `AttentionInterface`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    config: Any = decoder.config
    way = _WAYS[config.model_type](decoder, device, dtype)
    functions: Any = AttentionInterface
    function = functions()[attention]
    # MPT's forward reads the mask's dtype, so it must be given a mask, of any shape.
    AttentionMaskInterface.register(_NO_MASK, _no_mask)
    config._attn_implementation = _NO_MASK
    name, method = _REPLACED[config.model_type]
    modules: Iterator[Any] = (module for module in decoder.modules() if type(module).__name__ == name)
    for module in modules:
        setattr(module, method, types.MethodType(way.function, module))
        module.peerd_attention = function
        module.peerd_key_bias = way.bias


@dataclass(frozen=True, slots=True)
class _Way:
    """The replacement for a method of a family's attention modules, and its key bias."""

    function: Callable[..., Any]
    bias: KeyBias | None = None


def _no_mask(**_: Any) -> torch.Tensor:
    """A mask that nothing reads: our attention makes its own."""
    return torch.zeros((), dtype=torch.bool)


def _attend(module: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention of `query` `[batch, heads, positions, width]`, with the interface's shape `[batch, positions,
    width]`.
    """
    output, _ = module.peerd_attention(
        module, query, keys, values, None, scaling=scaling, key_bias=module.peerd_key_bias
    )
    result: torch.Tensor = output.flatten(2)
    return result


def _bloom(decoder: Any, device: torch.device, dtype: torch.dtype) -> _Way:
    def alibi(length: int) -> torch.Tensor:
        slopes = alibi_slopes(decoder.num_heads, device)
        bias: torch.Tensor = slopes[:, None] * torch.arange(length, device=device)
        return bias.to(dtype)

    return _Way(_bloom_forward, KeyBias(alibi))


def _bloom_forward(
    module: Any,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    *,
    alibi: object,
    attention_mask: object,
    layer_past: Any = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
) -> tuple[torch.Tensor, None]:
    query, keys, values = module._reshape(module.query_key_value(hidden_states))
    if layer_past is not None:
        keys, values = layer_past.update(keys, values, module.layer_idx)
    output = _attend(module, query, keys, values, module.inv_norm_factor)
    return residual + module.dense(output), None


def _falcon(decoder: Any, device: torch.device, dtype: torch.dtype) -> _Way:
    from transformers.models.falcon import modeling_falcon

    falcon: Any = modeling_falcon
    heads = decoder.config.num_attention_heads
    width = decoder.config.hidden_size // heads

    def alibi(length: int) -> torch.Tensor:
        everywhere = torch.ones(1, length, dtype=torch.long, device=device)
        bias: torch.Tensor = falcon.build_alibi_tensor(everywhere, heads, dtype)
        result: torch.Tensor = bias.squeeze(1) / math.sqrt(width)
        return result

    return _Way(_falcon_forward, KeyBias(alibi) if decoder.use_alibi else None)


def _falcon_forward(
    module: Any,
    hidden_states: torch.Tensor,
    *,
    alibi: object,
    attention_mask: object,
    position_ids: object = None,
    layer_past: Any = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    position_embeddings: Any = None,
) -> tuple[torch.Tensor, None]:
    from transformers.models.falcon import modeling_falcon

    falcon: Any = modeling_falcon
    fused = module.query_key_value(hidden_states)
    if module.new_decoder_architecture:
        # A key and a value for each group of queries; Transformers would repeat them before caching.
        groups = fused.unflatten(-1, (module.num_kv_heads, -1, module.head_dim))
        parts = groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
    else:
        parts = module._split_heads(fused)
    query, keys, values = (part.transpose(1, 2) for part in parts)
    if module.peerd_key_bias is None:
        query, keys = falcon.apply_rotary_pos_emb(query, keys, *position_embeddings)
    if layer_past is not None:
        keys, values = layer_past.update(keys, values, module.layer_idx)
    return module.dense(_attend(module, query, keys, values, module.inv_norm_factor)), None


def _mpt(decoder: Any, device: torch.device, dtype: torch.dtype) -> _Way:
    from transformers.models.mpt import modeling_mpt

    mpt: Any = modeling_mpt

    def alibi(length: int) -> torch.Tensor:
        bias: torch.Tensor = mpt.build_mpt_alibi_tensor(decoder.num_heads, length, device=device)
        return bias.squeeze(1)

    return _Way(_mpt_forward, KeyBias(alibi, from_end=True))


def _mpt_forward(
    module: Any, hidden_states: torch.Tensor, position_bias: object, attention_mask: object = None, **given: Any
) -> tuple[torch.Tensor, None]:
    fused = module.Wqkv(hidden_states)
    if module.clip_qkv:
        fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, keys, values = (
        part.unflatten(-1, (module.n_heads, module.head_dim)).transpose(1, 2) for part in fused.chunk(3, dim=2)
    )
    cache = take_cache(given)
    if cache is not None:
        keys, values = cache.update(keys, values, module.layer_idx)
    return module.out_proj(_attend(module, query, keys, values, module.softmax_scale)), None


def _gptj(*_: Any) -> _Way:
    return _Way(_scaled_by_head)


def _codegen(*_: Any) -> _Way:
    return _Way(_scaled_by_head)


def _scaled_by_head(module: Any, *args: Any) -> tuple[torch.Tensor, None]:
    return _by_head(module, *args, scaling=1 / module.scale_attn)


def _gpt_neo(decoder: Any, *_: Any) -> _Way:
    for block in decoder.h:
        block.attn.attention.layer_idx = block.attn.attention.layer_id
    return _Way(lambda module, *args: _by_head(module, *args, scaling=1.0))


def _gpt_neox_japanese(*_: Any) -> _Way:
    def attend(module: Any, *args: Any) -> tuple[torch.Tensor, None]:
        return _by_head(module, *args, scaling=1 / module.norm_factor)

    return _Way(attend)


def _by_head(
    module: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, _mask: object, *, scaling: float
) -> tuple[torch.Tensor, None]:
    """The result of these modules' `_attn`: `[batch, heads, positions, width]`."""
    # Some of them rotate queries in fp32 and cache keys in the model's own dtype.
    output = _attend(module, query.to(values.dtype), keys.to(values.dtype), values, scaling)
    return output.view(*output.shape[:2], query.shape[1], -1).transpose(1, 2), None


# By model type: the class of its attention modules, and the method that is replaced.
_REPLACED = {
    "bloom": ("BloomAttention", "forward"),
    "codegen": ("CodeGenAttention", "_attn"),
    "falcon": ("FalconAttention", "forward"),
    "gpt_neo": ("GPTNeoSelfAttention", "_attn"),
    "gpt_neox_japanese": ("GPTNeoXJapaneseAttention", "_attn"),
    "gptj": ("GPTJAttention", "_attn"),
    "mpt": ("MptAttention", "forward"),
}

_WAYS: dict[str, Callable[[Any, torch.device, torch.dtype], _Way]] = {
    "bloom": _bloom,
    "codegen": _codegen,
    "falcon": _falcon,
    "gpt_neo": _gpt_neo,
    "gpt_neox_japanese": _gpt_neox_japanese,
    "gptj": _gptj,
    "mpt": _mpt,
}
