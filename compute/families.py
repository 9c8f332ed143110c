"""Which architectures can be cut into spans, and the little that each needs beyond the common rule.

A row names Transformers' own classes and where they keep their parts; the classes are imported only when
used. What a decoder does to its input embeddings inside its forward (Granite's multiplier, Bloom's norm)
belongs to the head, and is named here so that a span can leave it out. Knows no tensors and no files.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from peerd.compute.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Fused:
    """A parameter that checkpoints store in pieces, one set an expert.

    `parameter` is its name inside a block, of shape [experts, rows of all parts, columns]; `parts` are the stored
    names, with `{expert}` for the expert's number, in the order in which their rows are concatenated.
    """

    parameter: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """Where one architecture keeps its parts. Attribute names are those of its decoder."""

    model_type: str
    module: str
    prefix: str
    layers: str = "layers"
    norm: str = "norm"
    embeddings: str = "embed_tokens"
    #: Stored name inside a block -> the parameter's name there, for names that Transformers has changed since.
    renamed: tuple[tuple[str, str], ...] = ()
    fused: tuple[Fused, ...] = ()
    #: A norm that the decoder's forward applies to its input embeddings.
    embedding_norm: str | None = None
    #: An attribute by which the decoder's forward multiplies its input embeddings.
    embedding_scale: str | None = None
    #: A table of absolute positions that the decoder's forward adds to its input embeddings. The head's: it adds
    #: row `position + position_offset`; a span adds nothing.
    positions: str | None = None
    position_offset: int = 0
    #: Linear maps (or None, by the configuration) between the width of the embeddings and that of the blocks. The head's.
    project_in: str | None = None
    project_out: str | None = None
    #: Where the base model (`causal.base_model`) keeps the decoder, if it isn't the decoder itself.
    decoder_at: str = ""
    #: Where the causal model keeps its LM head.
    lm_head: str = "lm_head"
    #: Whether all blocks slide once the configuration sets a `sliding_window`, rather than those that it lists.
    uniform_window: bool = False
    #: Whether attention goes through Transformers' `AttentionInterface`.
    attention_interface: bool = True
    # Only where they are not called after `prefix`.
    config_class: str = ""
    decoder_class: str = ""

    def config_type(self) -> type[PreTrainedConfig]:
        """The configuration class, imported now."""
        config: type[PreTrainedConfig] = self._load("configuration", self.config_class or f"{self.prefix}Config")
        return config

    def decoder_type(self) -> type[PreTrainedModel]:
        """The class of the base model: embeddings, blocks and final norm, imported now."""
        decoder: type[PreTrainedModel] = self._load("modeling", self.decoder_class or f"{self.prefix}Model")
        return decoder

    def causal_type(self) -> type[PreTrainedModel]:
        """The class of the whole language model, imported now."""
        causal: type[PreTrainedModel] = self._load("modeling", f"{self.prefix}ForCausalLM")
        return causal

    def _load(self, kind: str, name: str) -> Any:
        return getattr(importlib.import_module(f"transformers.models.{self.module}.{kind}_{self.module}"), name)


_QWEN_EXPERTS = (
    Fused(
        "mlp.experts.gate_up_proj",
        ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    ),
    Fused("mlp.experts.down_proj", ("mlp.experts.{expert}.down_proj.weight",)),
)
_MIXTRAL_EXPERTS = (
    Fused("mlp.experts.gate_up_proj", ("mlp.experts.{expert}.w1.weight", "mlp.experts.{expert}.w3.weight")),
    Fused("mlp.experts.down_proj", ("mlp.experts.{expert}.w2.weight",)),
)

_ROWS = (
    Family("llama", "llama", "Llama"),
    Family("mistral", "mistral", "Mistral", uniform_window=True),
    Family(
        "mixtral",
        "mixtral",
        "Mixtral",
        renamed=(("block_sparse_moe.", "mlp."),),
        fused=_MIXTRAL_EXPERTS,
        uniform_window=True,
    ),
    Family("qwen2", "qwen2", "Qwen2"),
    Family("qwen3", "qwen3", "Qwen3"),
    Family("qwen3_moe", "qwen3_moe", "Qwen3Moe", fused=_QWEN_EXPERTS, uniform_window=True),
    Family("gemma2", "gemma2", "Gemma2"),
    Family("gemma3_text", "gemma3", "Gemma3", config_class="Gemma3TextConfig", decoder_class="Gemma3TextModel"),
    Family("gpt_oss", "gpt_oss", "GptOss"),
    Family("smollm3", "smollm3", "SmolLM3"),
    Family("phi3", "phi3", "Phi3", uniform_window=True),
    Family("olmo2", "olmo2", "Olmo2"),
    Family("granite", "granite", "Granite", embedding_scale="embedding_multiplier"),
    Family("stablelm", "stablelm", "StableLm"),
    Family("starcoder2", "starcoder2", "Starcoder2", uniform_window=True),
    Family("cohere2", "cohere2", "Cohere2"),
    Family(
        "bloom",
        "bloom",
        "Bloom",
        layers="h",
        norm="ln_f",
        embeddings="word_embeddings",
        embedding_norm="word_embeddings_layernorm",
        attention_interface=False,
    ),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({row.model_type: row for row in _ROWS})

# A block of these needs more than the hidden states of the one before it, and a hop passes nothing else.
_CROSS_BLOCK: Mapping[str, str] = MappingProxyType(
    {
        "gemma3n": "its blocks share KV caches and take per-layer inputs",
        "gemma3n_text": "its blocks share KV caches and take per-layer inputs",
        "gemma4": "its blocks share KV caches and take per-layer inputs",
        "gemma4_text": "its blocks share KV caches and take per-layer inputs",
        "zamba": "its blocks share one attention block and take the embeddings again",
        "zamba2": "its blocks share one attention block and take the embeddings again",
    }
)


def family_named(model_type: object) -> Family:
    """The row for a config's `model_type`. Raises UnsupportedModel, with the reason where there is a known one."""
    if isinstance(model_type, str):
        if family := FAMILIES.get(model_type):
            return family
        if reason := _CROSS_BLOCK.get(model_type):
            raise UnsupportedModel(f"{model_type} cannot be cut into spans: {reason}")
    raise UnsupportedModel(f"architecture {model_type!r} is not one of those supported: {', '.join(sorted(FAMILIES))}")
