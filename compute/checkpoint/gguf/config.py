"""Makes the configuration that a GGUF file describes, from its metadata and from the tensors that it has.

It uses Transformers' own tables, but not Transformers' reader, which spends seconds on a vocabulary that we do not
need. Metadata do not say everything: llama.cpp derives some of it from the architecture, and some of it can only be
seen from the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from peerd.compute.checkpoint.gguf.architectures import Architecture
from peerd.compute.checkpoint.gguf.header import LongArray
from peerd.compute.checkpoint.gguf.rope import head_width, rope_scaling
from peerd.compute.checkpoint.gguf.split import GgufFiles
from peerd.compute.checkpoint.published_config import make_config
from peerd.compute.errors import UnsupportedModelError
from peerd.compute.transformers_compat import gguf_tables

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from peerd.compute.families.family import Family

# The 27B Gemmas scale queries by the square root of hidden_size / heads; all other Gemmas use a head's width. No field
# says so. Like llama.cpp, we recognise them by their number of blocks.
_GEMMA_27B_BLOCKS: Mapping[str, int] = MappingProxyType({"gemma2": 46, "gemma3": 62})
# llama.cpp's number for routers that choose experts by a sigmoid.
_SIGMOID = 2


def config_of(
    file: GgufFiles, architecture: Architecture, family: Family
) -> tuple[PreTrainedConfig, Mapping[str, Any]]:
    """The configuration, and the fields that Transformers' tensor processors read. Raises CheckpointError,
    UnsupportedModelError.
    """
    if file.metadata.get(f"{architecture.name}.attention.causal", True) is not True:
        raise UnsupportedModelError(f"{file.path}: its blocks attend to later positions")
    fields = _table_fields(file, architecture)
    fields |= _facts_of_tensors(file, architecture, fields)
    scaling = rope_scaling(file, architecture.name, fields)
    if scaling is not None:
        # Published GPT-OSS files leave out that their corrections are not rounded.
        fields["rope_scaling"] = scaling | ({"truncate": False} if architecture.name == "gpt-oss" else {})
        if scaling["rope_type"] == "longrope":
            # Phi's configuration has the original length here, and looks for it nowhere else.
            fields["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    config = make_config(family, dict(fields), file.path)
    if architecture.name in _GEMMA_27B_BLOCKS:
        is_27b = config.num_hidden_layers == _GEMMA_27B_BLOCKS[architecture.name]
        width = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
        config.query_pre_attn_scalar = width
    return config, fields


def _table_fields(file: GgufFiles, architecture: Architecture) -> dict[str, Any]:
    """The fields that Transformers' tables, and the additions in our table, read from the metadata."""
    fields_of, defaults_of = gguf_tables()
    table = architecture.table or architecture.model_type
    tables: Any = (
        (architecture.name, fields_of[table]),
        (architecture.name, architecture.more),
        ("tokenizer", fields_of["tokenizer"]),
    )
    # A file that names no such token has none. Without this line the configuration's class would use another model's.
    fields: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    fields |= defaults_of.get(table) or {}
    for section, names in tables:
        for key, name in names.items():
            value = file.metadata.get(f"{section}.{key}")
            if name is not None and value is not None:
                fields[name] = value
    if architecture.partial_rotary:
        turned, width = file.metadata.get(f"{architecture.name}.rope.dimension_count"), head_width(fields)
        if isinstance(turned, int) and width > 0:
            fields["partial_rotary_factor"] = turned / width
    return fields | {"model_type": architecture.model_type}


def _facts_of_tensors(file: GgufFiles, architecture: Architecture, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that only the tensors show."""
    tensors = file.tensors
    # llama.cpp writes an output matrix only if the head is not tied to the embeddings.
    facts: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in tensors or architecture.always_tied}
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if "token_embd.weight" in tensors:
        facts["vocab_size"] = tensors["token_embd.weight"].shape[0]
    elif isinstance(tokens, LongArray | tuple):
        facts["vocab_size"] = len(tokens)
    if architecture.name == "llama":
        # Without this field Transformers' processor leaves queries and keys in llama.cpp's order.
        facts["num_key_value_heads"] = fields.get("num_key_value_heads") or fields.get("num_attention_heads")
        facts["attention_bias"] = "blk.0.attn_output.bias" in tensors
    if architecture.name == "stablelm":
        facts["use_qkv_bias"] = "blk.0.attn_q.bias" in tensors
        facts["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in tensors
    if architecture.name == "falcon":
        # The first Falcons have one key head for all heads; later ones have one for each group of heads.
        grouped = fields.get("num_kv_heads", 1) != 1
        norms = 2 if "blk.0.attn_norm_2.weight" in tensors else 1
        facts |= {"new_decoder_architecture": grouped, "num_ln_in_parallel_attn": norms if grouped else None}
    if architecture.name == "minimax-m2" and file.metadata.get("minimax-m2.expert_gating_func", _SIGMOID) != _SIGMOID:
        raise UnsupportedModelError(f"{file.path}: its experts are not chosen by a sigmoid")
    return facts
