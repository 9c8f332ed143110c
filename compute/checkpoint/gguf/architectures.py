"""The table of GGUF architectures that are read, each with its family, and of those that are refused, with the reason.

Transformers' own tables turn metadata into configurations. A row here adds the fields that those tables leave out;
without it such a field would have the default of a model of another size. Fields that follow from several metadata, or
from the tensors, are found in `facts.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from peerd.compute.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Architecture:
    """How GGUF files of one architecture become a family's configuration."""

    name: str
    model_type: str
    #: The name of Transformers' table, if it is not the family's.
    table: str = ""
    #: Metadata that the table leaves out: key, without the architecture -> field of the configuration.
    more: Mapping[str, str] = field(default_factory=dict)
    #: The architecture whose tensor processor (of Transformers) reads this one's tensors, if it is another.
    processor: str = ""
    #: Whether rotary embeddings may turn only a part of each head.
    partial_rotary: bool = False
    #: Whether the configuration ties the LM head to the embeddings even if the file stores an LM head of its own.
    always_tied: bool = False
    #: Whether blocks with a window have rotary embeddings of their own, which are not scaled.
    rope_by_kind: bool = False


#: llama.cpp's number for routers that choose experts by a sigmoid.
SIGMOID = 2
# Transformers' table with what most decoders have, which does not take `rope.dimension_count` for a head's width.
_COMMON = "qwen3"
_EPS = {"attention.layer_norm_epsilon": "layer_norm_epsilon"}
_WIDTH = {"attention.key_length": "head_dim"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_COHERE = {"attention.layer_norm_epsilon": "layer_norm_eps", "logit_scale": "logit_scale"}
# DeepSeek's experts, and GLM's, which are like them.
_ROUTED = {
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_LATENT = {"attention.kv_lora_rank": "kv_lora_rank", "rope.dimension_count": "qk_rope_head_dim"}
_LFM = {"attention.layer_norm_rms_epsilon": "norm_eps"}
_LFM_ROUTED = {
    "leading_dense_block_count": "num_dense_layers",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_LLAMA4 = {
    "feed_forward_length": "intermediate_size_mlp",
    "expert_feed_forward_length": "intermediate_size",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "interleave_moe_layer_step": "interleave_moe_layer_step",
}

_ROWS = (
    Architecture("bloom", "bloom", always_tied=True),
    Architecture(
        "falcon",
        "falcon",
        more={**_EPS, "attention.head_count_kv": "num_kv_heads", "feed_forward_length": "ffn_hidden_size"},
        always_tied=True,
    ),
    # From here to `smollm3` Transformers has neither a table nor a processor. The files are written like those of the
    # relatives that a row names, or a processor of ours reads them.
    Architecture("cohere2", "cohere2", table=_COMMON, more={**_COHERE, **_WINDOW}),
    Architecture("command-r", "cohere", table=_COMMON, more=_COHERE),
    Architecture("deepseek2", "deepseek_v2", table=_COMMON, more={**_ROUTED, **_LATENT}),
    Architecture("exaone4", "exaone4", table=_COMMON, more=_WIDTH),
    Architecture("gemma", "gemma", table="gemma2", processor="gemma2"),
    Architecture("glm4", "glm4", table=_COMMON, more=_WIDTH, partial_rotary=True),
    Architecture("glm4moe", "glm4_moe", table=_COMMON, more={**_ROUTED, **_WIDTH}, partial_rotary=True),
    Architecture("granite", "granite", table="llama", more=_GRANITE, processor="llama"),
    Architecture("llama4", "llama4_text", table=_COMMON, more={**_LLAMA4, **_WIDTH}),
    Architecture("lfm2", "lfm2", more=_LFM),
    Architecture("lfm2moe", "lfm2_moe", table="lfm2", more={**_LFM, **_LFM_ROUTED}),
    Architecture("mistral3", "mistral", table="llama", more={**_WIDTH, **_WINDOW}, processor="llama"),
    Architecture("olmo2", "olmo2", table=_COMMON),
    Architecture("smollm3", "smollm3", table="llama", processor="llama"),
    Architecture("gemma2", "gemma2", more=_CAPS),
    Architecture("gemma3", "gemma3_text", table="gemma3", more={**_CAPS, "rope.freq_base_swa": "rope_local_base_freq"}),
    Architecture("gpt-oss", "gpt_oss", more={**_WIDTH, **_WINDOW, "expert_feed_forward_length": "intermediate_size"}),
    Architecture("gpt2", "gpt2", more={"context_length": "n_positions", "feed_forward_length": "n_inner"}),
    Architecture("llama", "llama", more=_WIDTH),
    Architecture("minimax-m2", "minimax_m2", more={"expert_feed_forward_length": "intermediate_size"}),
    Architecture(
        "nemotron",
        "nemotron",
        more={**_WIDTH, "attention.layer_norm_epsilon": "norm_eps"},
        partial_rotary=True,
    ),
    Architecture("phi3", "phi3", more=_WINDOW, partial_rotary=True),
    Architecture("qwen2", "qwen2"),
    Architecture(
        "qwen2moe",
        "qwen2_moe",
        more={
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
    ),
    Architecture("qwen3", "qwen3", more=_WIDTH),
    Architecture("qwen3moe", "qwen3_moe", more={"expert_feed_forward_length": "moe_intermediate_size"}),
    Architecture("stablelm", "stablelm", more={"rope.freq_base": "rope_theta"}, partial_rotary=True),
    Architecture("starcoder2", "starcoder2", more={"rope.freq_base": "rope_theta", **_WINDOW}),
)
#: By GGUF's name of the architecture.
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({row.name: row for row in _ROWS})
# llama.cpp writes some families under the name of a relative. These rows are chosen by `_relative`.
_MIXTRAL = Architecture(
    "llama",
    "mixtral",
    table="mistral",
    more={**_WIDTH, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
)
_DEEPSEEK_V3 = Architecture("deepseek2", "deepseek_v3", table=_COMMON, more={**_ROUTED, **_LATENT})
_MINISTRAL3 = Architecture("mistral3", "ministral3", table="llama", more={**_WIDTH, **_WINDOW}, processor="llama")
_OLMO3 = Architecture("olmo2", "olmo3", table=_COMMON, more=_WINDOW, rope_by_kind=True)
# The vocabulary of GLM-4.7 Flash. Its first files say nothing of the sigmoid by which it chooses experts.
_GLM_FLASH_VOCABULARY = 154880

_RECURRENT = "some of its blocks keep a state rather than keys and values, which we do not read from GGUF files"
_ENCODER = "it is an encoder and a decoder, not a chain of blocks"
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "mamba": _RECURRENT,
        "mamba2": _RECURRENT,
        "qwen35": _RECURRENT,
        "qwen35moe": _RECURRENT,
        "qwen3next": _RECURRENT,
        "t5": _ENCODER,
        "t5encoder": _ENCODER,
        "umt5": _ENCODER,
        "gemma3n": "its blocks share KV caches and take per-layer inputs",
        "gemma4": "its blocks share KV caches and take per-layer inputs",
        "deci": "its blocks differ in ways that its metadata do not say, and Transformers has no such model",
    }
)


def architecture_of(metadata: Mapping[str, object], where: object) -> Architecture:
    """The row for a file with these metadata. Raises UnsupportedModelError, which names the file `where` and the
    reason.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        if isinstance(name, str) and name in _REFUSED:
            raise UnsupportedModelError(f"{where}: GGUF architecture {name} cannot be served: {_REFUSED[name]}")
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(f"{where}: GGUF architecture {name!r} is not one of those supported: {known}")
    return _relative(name, metadata) or ARCHITECTURES[name]


def _relative(name: str, metadata: Mapping[str, object]) -> Architecture | None:
    """The row of the family that llama.cpp calls `name` as well; None if it is the family of that name itself."""
    if name == "llama" and metadata.get("llama.expert_count"):
        return _MIXTRAL
    if name == "olmo2" and metadata.get("olmo2.attention.sliding_window"):
        return _OLMO3
    if name == "mistral3" and metadata.get("mistral3.attention.temperature_scale"):
        return _MINISTRAL3
    gating = metadata.get("deepseek2.expert_gating_func")
    unsaid = gating is None and metadata.get("deepseek2.vocab_size") == _GLM_FLASH_VOCABULARY
    return _DEEPSEEK_V3 if name == "deepseek2" and (gating == SIGMOID or unsaid) else None
