"""Opening a GGUF file as a checkpoint: its configuration and the names of its tensors.

Uses Transformers' own tables from GGUF's metadata to configurations, but not its reader, which takes
seconds over a vocabulary that we do not need. What those tables leave out, and would compute wrong results
silently (scaled RoPE, experts in a llama file, parts of a split file), is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from peerd.compute.checkpoint import Checkpoint, make_config
from peerd.compute.cut_model import build_on_meta
from peerd.compute.errors import UnsupportedModel
from peerd.compute.families import family_named
from peerd.compute.family import Family
from peerd.compute.gguf_file import GgufFile, LongArray
from peerd.compute.gguf_weights import GgufWeights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# GGUF's architecture -> the family. Only those whose metadata say all that the configuration needs.
_ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "llama": "llama",
        "qwen2": "qwen2",
        "qwen3": "qwen3",
        "qwen3moe": "qwen3_moe",
        "gemma2": "gemma2",
        "gemma3": "gemma3_text",
        "phi3": "phi3",
        "bloom": "bloom",
    }
)
# What Transformers' tables do not carry over: it would take the default of another model's size.
_MORE_FIELDS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "qwen3": {"attention.key_length": "head_dim"},
        "qwen3moe": {"expert_feed_forward_length": "moe_intermediate_size"},
        "phi3": {"attention.sliding_window": "sliding_window"},
        "gemma2": {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
    }
)
# The Gemmas of 27B, by their number of blocks, scale queries by the square root of this where all others take the
# width of a head; no field says so, and llama.cpp tells them apart as we do.
_GEMMA_27B_BLOCKS: Mapping[str, int] = MappingProxyType({"gemma2": 46, "gemma3": 62})
# Tensors that change RoPE's frequencies.
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file. Reads its header only. Raises CheckpointError, UnsupportedModel."""
    file = GgufFile(path)
    try:
        architecture = file.metadata.get("general.architecture")
        model_type = _ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
        if not isinstance(architecture, str) or model_type is None:
            known = ", ".join(sorted(_ARCHITECTURES))
            raise UnsupportedModel(f"{path}: GGUF architecture {architecture!r} is not one of those supported: {known}")
        _refuse_what_would_be_wrong(file, architecture)
        family = family_named(model_type)
        fields = _config_fields(file, architecture, model_type)
        config = make_config(family, fields, path)
        if architecture in _GEMMA_27B_BLOCKS:
            is_27b = config.num_hidden_layers == _GEMMA_27B_BLOCKS[architecture]
            width = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
            config.query_pre_attn_scalar = width
        weights = _weights(file, family, config, fields)
    except BaseException:
        file.close()
        raise
    # The weights file holds the configuration too.
    return Checkpoint(path, family, config, weights, name=path.stem, published_config={})


def _refuse_what_would_be_wrong(file: GgufFile, architecture: str) -> None:
    metadata = file.metadata
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModel(
            f"{file.path}: is one of {metadata['split.count']} parts; only whole GGUF files are read"
        )
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise UnsupportedModel(f"{file.path}: its RoPE is scaled ({scaling}), which GGUF states incompletely")
    if scaled := [name for name in _ROPE_TENSORS if name in file.tensors]:
        raise UnsupportedModel(f"{file.path}: tensor {scaled[0]} scales its RoPE, which Transformers does not read")
    if architecture == "llama" and metadata.get("llama.expert_count", 0):
        raise UnsupportedModel(f"{file.path}: is a llama with experts, which Transformers does not read from GGUF")


def _config_fields(file: GgufFile, architecture: str, model_type: str) -> dict[str, Any]:
    """What Transformers' tables make of the metadata."""
    from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

    # The tables call it by the family's name, except gemma3.
    table_name = "gemma3" if architecture == "gemma3" else model_type
    tables: Any = (
        (architecture, GGUF_CONFIG_MAPPING[table_name]),
        (architecture, _MORE_FIELDS.get(architecture, {})),
        ("tokenizer", GGUF_CONFIG_MAPPING["tokenizer"]),
    )
    fields: dict[str, Any] = dict(GGUF_CONFIG_DEFAULTS_MAPPING.get(table_name) or {})
    for section, table in tables:
        for key, name in table.items():
            value = file.metadata.get(f"{section}.{key}")
            if name is not None and value is not None:
                fields[name] = value
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, LongArray | tuple):
        fields.setdefault("vocab_size", len(tokens))
    # llama.cpp writes an output matrix only where it is not the embedding; bloom's always is.
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors or model_type == "bloom"
    return fields | {"model_type": model_type}


def _weights(file: GgufFile, family: Family, config: PreTrainedConfig, fields: Mapping[str, Any]) -> GgufWeights:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    architecture = str(file.metadata["general.architecture"])
    processor_type: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = processor_type(config=dict(fields))
    names = _parameter_names(family, config, architecture, processor)
    sources: dict[str, list[str]] = {}
    for stored, parameter in names.items():
        # A parameter without `.weight`, such as fused experts, is stored with it.
        sources.setdefault(parameter, []).append(stored if stored in file.tensors else f"{stored}.weight")
    found = {name: tuple(stored) for name, stored in sources.items() if not file.tensors.keys().isdisjoint(stored)}
    return GgufWeights(file, found, names, processor)


def _parameter_names(family: Family, config: PreTrainedConfig, architecture: str, processor: Any) -> dict[str, str]:
    """GGUF's name -> the parameter, for every parameter that the model has.

    Transformers has this as `get_gguf_hf_weights_map`, which takes seconds for 30 blocks.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    known = get_tensor_name_map(arch, config.num_hidden_layers)
    model = build_on_meta(family.causal_type(), config, torch.float32)
    prefix = f"{model.base_model_prefix}."
    names: dict[str, str] = {}
    for full_name in map(processor.preprocess_name, model.state_dict()):
        stem, dot, suffix = full_name.rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, dot, suffix = full_name, "", ""
        # Some files were converted from the base model, whose names have no prefix.
        gguf_name = known.get_name(stem) or known.get_name(stem.removeprefix(prefix))
        if gguf_name is not None:
            names[f"{gguf_name}{dot}{suffix}"] = full_name
        else:
            processor.perform_fallback_tensor_mapping(names, f"{dot}{suffix}", "", full_name)
    return {stored: name.removeprefix(prefix) for stored, name in names.items()}
