"""The table of GGUF architectures that are read, each with its family, and of those that are refused, with the reason.

Transformers' own tables turn metadata into configurations. A row here adds the fields that those tables leave out;
without it such a field would have the default of a model of another size.
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

_ROWS = (
    Architecture("bloom", "bloom", always_tied=True),
    Architecture(
        "falcon",
        "falcon",
        more={**_EPS, "attention.head_count_kv": "num_kv_heads", "feed_forward_length": "ffn_hidden_size"},
        always_tied=True,
    ),
    # Transformers has neither a table nor a processor for these three; their files are written like those of their
    # relatives.
    Architecture("gemma", "gemma", table="gemma2", processor="gemma2"),
    Architecture("granite", "granite", table="llama", more=_GRANITE, processor="llama"),
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
# llama.cpp writes the architecture `llama` for a llama with experts too.
_MIXTRAL = Architecture(
    "llama",
    "mixtral",
    table="mistral",
    more={**_WIDTH, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
)
_RECURRENT = "some of its blocks keep a state rather than keys and values"
_ENCODER = "it is an encoder and a decoder, not a chain of blocks"
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "mamba": _RECURRENT,
        "mamba2": _RECURRENT,
        "lfm2": _RECURRENT,
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
    return _MIXTRAL if name == "llama" and metadata.get("llama.expert_count") else ARCHITECTURES[name]
