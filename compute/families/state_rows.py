"""The rows of families that keep running states in some or all blocks: convolutions, state spaces, linear attention.

What such a block keeps, and which of its modules owns it, is in `running_state.py`.
"""

from __future__ import annotations

from peerd.compute.families.family import Family, Fused
from peerd.compute.families.rows import EXPERTS, GRANITE_NAMES, MIXTRAL_EXPERTS, MIXTRAL_NAMES

_LFM_EXPERTS = (
    Fused(
        "feed_forward.experts.gate_up_proj",
        ("feed_forward.experts.{expert}.w1.weight", "feed_forward.experts.{expert}.w3.weight"),
    ),
    Fused("feed_forward.experts.down_proj", ("feed_forward.experts.{expert}.w2.weight",)),
)
_JAMBA_EXPERTS = (
    Fused(
        "feed_forward.experts.gate_up_proj",
        ("feed_forward.experts.{expert}.gate_proj.weight", "feed_forward.experts.{expert}.up_proj.weight"),
    ),
    Fused("feed_forward.experts.down_proj", ("feed_forward.experts.{expert}.down_proj.weight",)),
)
_NEMOTRON_EXPERTS = (
    Fused("mixer.experts.up_proj", ("mixer.experts.{expert}.up_proj.weight",)),
    Fused("mixer.experts.down_proj", ("mixer.experts.{expert}.down_proj.weight",)),
)


def _convolutions(mixer: str) -> Fused:
    """Publishers store one convolution each for queries, keys and values; Transformers runs them as one."""
    return Fused(f"{mixer}.conv1d.weight", tuple(f"{mixer}.{part}_conv1d.weight" for part in "qkv"))


# What a decoder with the names of Mamba calls its parts.
_MAMBA_NAMES = (("embedding.", "embeddings."),)

STATE_ROWS = (
    # Short convolutions.
    Family("lfm2", "Lfm2", norm="embedding_norm"),
    Family("lfm2_moe", "Lfm2Moe", norm="embedding_norm", fused=_LFM_EXPERTS),
    Family("lfm3", "Lfm3", norm="embedding_norm", renamed=(("self_attn.gate_proj.", "self_attn.g_proj."),)),
    # Linear attention: gated delta rules, which have one decay for each head, or one for each channel (Kimi).
    Family("qwen3_next", "Qwen3Next", fused=EXPERTS),
    Family(
        "qwen3_5_text",
        "Qwen3_5",
        module="qwen3_5",
        config_class="Qwen3_5TextConfig",
        decoder_class="Qwen3_5TextModel",
    ),
    Family(
        "qwen3_5_moe_text",
        "Qwen3_5Moe",
        module="qwen3_5_moe",
        config_class="Qwen3_5MoeTextConfig",
        decoder_class="Qwen3_5MoeTextModel",
        fused=EXPERTS,
    ),
    Family(
        "olmo_hybrid",
        "OlmoHybrid",
        renamed=(
            ("attention_layer_norm.", "input_layernorm."),
            ("feedforward_layer_norm.", "post_attention_layernorm."),
        ),
        fused=(_convolutions("linear_attn"),),
    ),
    Family(
        "kimi_linear",
        "KimiLinear",
        renamed=(
            *MIXTRAL_NAMES,
            ("self_attn.f_a_proj.", "self_attn.forget_gate.f_a_proj."),
            ("self_attn.f_b_proj.", "self_attn.forget_gate.f_b_proj."),
            ("self_attn.dt_bias", "self_attn.forget_gate.dt_bias"),
            ("self_attn.A_log", "self_attn.forget_gate.A_log"),
        ),
        fused=(*MIXTRAL_EXPERTS, _convolutions("self_attn")),
        latent=True,
    ),
    Family(
        "bailing_hybrid",
        "BailingHybrid",
        renamed=(
            ("word_embeddings.", "embed_tokens."),
            (".attention.", ".self_attn."),
            ("self_attn.f_proj.", "self_attn.forget_gate.f_proj."),
            ("self_attn.dt_bias", "self_attn.forget_gate.dt_bias"),
            ("self_attn.A_log", "self_attn.forget_gate.A_log"),
            ("self_attn.dense.", "self_attn.o_proj."),
            ("mlp.gate.expert_bias", "mlp.gate.e_score_correction_bias"),
        ),
        fused=(*EXPERTS, _convolutions("self_attn")),
        latent=True,
    ),
    # State spaces (Mamba-2), alone, in turn with attention, or beside it in each block (Falcon-H1).
    Family(
        "mamba2", "Mamba2", norm="norm_f", embeddings="embeddings", stored_under=("backbone.",), renamed=_MAMBA_NAMES
    ),
    Family("bamba", "Bamba", norm="final_layernorm"),
    Family("falcon_h1", "FalconH1", norm="final_layernorm", embedding_scale="embedding_multiplier"),
    Family("granitemoehybrid", "GraniteMoeHybrid", renamed=GRANITE_NAMES, embedding_scale="embedding_multiplier"),
    # Some of its blocks are only a feed-forward, or only experts.
    Family(
        "nemotron_h",
        "NemotronH",
        norm="norm_f",
        embeddings="embeddings",
        stored_under=("backbone.",),
        fused=_NEMOTRON_EXPERTS,
    ),
    # State spaces of the first kind (Mamba).
    Family("mamba", "Mamba", norm="norm_f", embeddings="embeddings", stored_under=("backbone.",), renamed=_MAMBA_NAMES),
    Family(
        "falcon_mamba",
        "FalconMamba",
        norm="norm_f",
        embeddings="embeddings",
        stored_under=("backbone.",),
        renamed=_MAMBA_NAMES,
    ),
    Family("jamba", "Jamba", norm="final_layernorm", fused=_JAMBA_EXPERTS),
)
