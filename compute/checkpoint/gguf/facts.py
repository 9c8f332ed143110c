"""Finds the fields of a configuration that only a GGUF file's tensors show, or that follow from several metadata.

llama.cpp derives some facts about a model from its architecture and its size, as its own reader does; where we do the
same, the constant names the model that it was read from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from peerd.compute.checkpoint.gguf.architectures import SIGMOID, Architecture
from peerd.compute.checkpoint.gguf.header import LongArray
from peerd.compute.checkpoint.gguf.split import GgufFiles
from peerd.compute.errors import CheckpointError, UnsupportedModelError
from peerd.protocol.span import MAX_BLOCKS

Fields = Mapping[str, Any]
Facts = Callable[[GgufFiles, Fields], dict[str, Any]]

_SOFTMAX = 1
# DeepSeek V2's 160 experts form 8 groups, of which a token may use 3; V3's 256 form 8, of which it may use 4. Files
# that were written before llama.cpp knew groups do not say so. GLM 4.5's 160 experts form one.
_UNSAID_GROUPS: Mapping[int, tuple[int, int]] = MappingProxyType({160: (8, 3), 256: (8, 4)})
# Llama 4 Maverick has so many experts, and is the only Llama 4 that does not normalise queries and keys.
_MAVERICK_EXPERTS = 128
# EXAONE 4 32B, whose first files do not name its window.
_EXAONE_32B_BLOCKS, _EXAONE_32B_WINDOW = 64, 4096
# EXAONE 4 and Olmo 3 have a block without a window after each three with one.
_FULL_EVERY = 4


def facts_of(file: GgufFiles, architecture: Architecture, fields: Fields) -> dict[str, Any]:
    """The fields that only the tensors show, or several metadata together. Raises CheckpointError,
    UnsupportedModelError.
    """
    tensors = file.tensors
    # llama.cpp writes an output matrix only if the head is not tied to the embeddings.
    facts: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in tensors or architecture.always_tied}
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if "token_embd.weight" in tensors:
        facts["vocab_size"] = tensors["token_embd.weight"].shape[0]
    elif isinstance(tokens, LongArray | tuple):
        facts["vocab_size"] = len(tokens)
    more = _OF.get(architecture.model_type)
    return facts if more is None else facts | more(file, fields)


def _llama(file: GgufFiles, fields: Fields) -> dict[str, Any]:
    # Without the first field Transformers' processor leaves queries and keys in llama.cpp's order.
    return {
        "num_key_value_heads": fields.get("num_key_value_heads") or fields.get("num_attention_heads"),
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
    }


def _mistral(file: GgufFiles, fields: Fields) -> dict[str, Any]:
    # The configuration's class has a window unless it is told that there is none.
    return {**_llama(file, fields), "sliding_window": fields.get("sliding_window")}


def _stablelm(file: GgufFiles, _: Fields) -> dict[str, Any]:
    return {
        "use_qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in file.tensors,
    }


def _falcon(file: GgufFiles, fields: Fields) -> dict[str, Any]:
    # The first Falcons have one key head for all heads; later ones have one for each group of heads.
    grouped = fields.get("num_kv_heads", 1) != 1
    norms = 2 if "blk.0.attn_norm_2.weight" in file.tensors else 1
    return {"new_decoder_architecture": grouped, "num_ln_in_parallel_attn": norms if grouped else None}


def _minimax_m2(file: GgufFiles, _: Fields) -> dict[str, Any]:
    if file.metadata.get("minimax-m2.expert_gating_func", SIGMOID) != SIGMOID:
        raise UnsupportedModelError(f"{file.path}: its experts are not chosen by a sigmoid")
    return {}


def _cohere(file: GgufFiles, _: Fields) -> dict[str, Any]:
    return {"use_qk_norm": "blk.0.attn_q_norm.weight" in file.tensors}


def _glm4(file: GgufFiles, _: Fields) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in file.tensors}


def _glm4_moe(file: GgufFiles, fields: Fields) -> dict[str, Any]:
    return {
        **_glm4(file, fields),
        **_routing(file, "glm4moe", fields),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
    }


def _llama4(file: GgufFiles, fields: Fields) -> dict[str, Any]:
    facts: dict[str, Any] = {"use_qk_norm": fields.get("num_local_experts") != _MAVERICK_EXPERTS}
    if file.metadata.get("llama4.attention.sliding_window") == 0:
        # So the converter writes a model of which every block has rotary embeddings and sees the whole text.
        facts |= {"attention_chunk_size": None, "no_rope_layers": [1] * _blocks(file, fields)}
    return facts


def _exaone4(file: GgufFiles, fields: Fields) -> dict[str, Any]:
    blocks = _blocks(file, fields)
    unsaid = _EXAONE_32B_WINDOW if blocks == _EXAONE_32B_BLOCKS else None
    window = file.metadata.get("exaone4.attention.sliding_window", unsaid)
    types = _layer_types(file, "exaone4", blocks) if window else ["full_attention"] * blocks
    return {"sliding_window": window or None, "layer_types": types}


def _lfm2(file: GgufFiles, fields: Fields) -> dict[str, Any]:
    # Blocks with a convolution have no key heads. What else makes the feed-forward's width is in the width already.
    blocks, heads = _blocks(file, fields), fields.get("num_key_value_heads")
    if not isinstance(heads, tuple) or len(heads) != blocks or not all(type(count) is int for count in heads):
        raise CheckpointError(f"{file.path}: its key heads by block are {heads!r}")
    return {
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "num_key_value_heads": max(heads),
        "conv_bias": any(name.endswith(".shortconv.conv.bias") for name in file.tensors),
        "block_auto_adjust_ff_dim": False,
    }


def _lfm2_moe(file: GgufFiles, fields: Fields) -> dict[str, Any]:
    return {**_lfm2(file, fields), "use_expert_bias": any(".exp_probs_b." in name for name in file.tensors)}


def _olmo3(file: GgufFiles, fields: Fields) -> dict[str, Any]:
    return {"layer_types": _layer_types(file, "olmo2", _blocks(file, fields))}


def _deepseek(file: GgufFiles, fields: Fields) -> dict[str, Any]:
    stated = file.metadata.get
    if stated("deepseek2.attention.temperature_scale") is not None:
        raise UnsupportedModelError(f"{file.path}: its queries grow with their position, which a DeepSeek's do not")
    # Files whose keys and values are stored apart call the width of a whole head `..._mla`: to llama.cpp they have one
    # head of latents.
    width, values = (
        stated(f"deepseek2.attention.{part}_length_mla", stated(f"deepseek2.attention.{part}_length"))
        for part in ("key", "value")
    )
    turned = fields.get("qk_rope_head_dim")
    if type(width) is not int or type(turned) is not int or width <= turned:
        raise CheckpointError(f"{file.path}: a head has width {width!r}, of which {turned!r} are turned")
    return {
        **_routing(file, "deepseek2", fields),
        "num_key_value_heads": fields.get("num_attention_heads"),
        "q_lora_rank": stated("deepseek2.attention.q_lora_rank"),
        "qk_nope_head_dim": width - turned,
        "v_head_dim": values,
    }


def _deepseek_v2(file: GgufFiles, fields: Fields) -> dict[str, Any]:
    gating = file.metadata.get("deepseek2.expert_gating_func", _SOFTMAX)
    facts = _deepseek(file, fields)
    if gating != _SOFTMAX or facts["norm_topk_prob"]:
        raise UnsupportedModelError(f"{file.path}: its experts' weights are not those of a DeepSeek V2")
    return facts | {"topk_method": "group_limited_greedy" if facts["n_group"] != 1 else "greedy"}


def _routing(file: GgufFiles, name: str, fields: Fields) -> dict[str, Any]:
    """How tokens choose experts, and how many blocks there are without those that only guess further tokens."""
    stated = file.metadata.get
    experts = stated(f"{name}.expert_count")
    groups, used = 1, 1
    if name == "deepseek2" and isinstance(experts, int):
        groups, used = _UNSAID_GROUPS.get(experts, (1, 1))
    guessing = stated(f"{name}.nextn_predict_layers", 0)
    blocks = _blocks(file, fields)
    if type(guessing) is not int or not 0 <= guessing < blocks:
        raise CheckpointError(f"{file.path}: {name}.nextn_predict_layers is {guessing!r}")
    return {
        "n_group": stated(f"{name}.expert_group_count", groups),
        "topk_group": stated(f"{name}.expert_group_used_count", used),
        "routed_scaling_factor": stated(f"{name}.expert_weights_scale", 1.0),
        "norm_topk_prob": stated(f"{name}.expert_weights_norm", False),
        "num_hidden_layers": blocks - guessing,
    }


def _blocks(file: GgufFiles, fields: Fields) -> int:
    blocks = fields.get("num_hidden_layers")
    if type(blocks) is not int or not 0 < blocks <= MAX_BLOCKS:
        raise CheckpointError(f"{file.path}: its block count is {blocks!r}")
    return blocks


def _layer_types(file: GgufFiles, name: str, blocks: int) -> list[str]:
    """Which blocks have a window. The metadata list them, or say after how many of them one has none."""
    pattern = file.metadata.get(f"{name}.attention.sliding_window_pattern", _FULL_EVERY)
    if type(pattern) is int and pattern > 0:
        pattern = tuple((block + 1) % pattern != 0 for block in range(blocks))
    if not isinstance(pattern, tuple) or len(pattern) < blocks:
        raise CheckpointError(f"{file.path}: {name}.attention.sliding_window_pattern is {pattern!r}")
    return ["sliding_attention" if windowed else "full_attention" for windowed in pattern[:blocks]]


_OF: Mapping[str, Facts] = MappingProxyType(
    {
        "cohere": _cohere,
        "deepseek_v2": _deepseek_v2,
        "deepseek_v3": _deepseek,
        "exaone4": _exaone4,
        "falcon": _falcon,
        "glm4": _glm4,
        "glm4_moe": _glm4_moe,
        "lfm2": _lfm2,
        "lfm2_moe": _lfm2_moe,
        "llama": _llama,
        "llama4_text": _llama4,
        "minimax_m2": _minimax_m2,
        "ministral3": _mistral,
        "mistral": _mistral,
        "mixtral": _llama,
        "olmo3": _olmo3,
        "stablelm": _stablelm,
    }
)
