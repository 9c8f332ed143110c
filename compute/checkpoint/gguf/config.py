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
from peerd.compute.checkpoint.gguf.facts import facts_of
from peerd.compute.checkpoint.gguf.rope import head_width, rope_fields
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


def config_of(
    file: GgufFiles, architecture: Architecture, family: Family
) -> tuple[PreTrainedConfig, Mapping[str, Any]]:
    """The configuration, and the fields that Transformers' tensor processors read. Raises CheckpointError,
    UnsupportedModelError.
    """
    if file.metadata.get(f"{architecture.name}.attention.causal", True) is not True:
        raise UnsupportedModelError(f"{file.path}: its blocks attend to later positions")
    fields = _table_fields(file, architecture)
    fields |= facts_of(file, architecture, fields)
    fields |= rope_fields(file, architecture, fields)
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
