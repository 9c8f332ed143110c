"""The table of families, one row for each architecture. `tests/compute/families/test_families.py` compares each with
the whole model.

Families with running states have their rows in `state_rows.py`.

A row names what the common rule cannot see: names that Transformers has changed since a checkpoint was published,
experts that are stored one by one, and what a decoder does before its first block. To add a family, add a row here, and
a tiny configuration in `tests/compute/tiny_families.py` if the family needs one; the tests do the rest.
"""

from __future__ import annotations

from peerd.compute.families.family import Family, Fused

EXPERTS = (
    Fused(
        "mlp.experts.gate_up_proj",
        ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    ),
    Fused("mlp.experts.down_proj", ("mlp.experts.{expert}.down_proj.weight",)),
)
MIXTRAL_EXPERTS = (
    Fused("mlp.experts.gate_up_proj", ("mlp.experts.{expert}.w1.weight", "mlp.experts.{expert}.w3.weight")),
    Fused("mlp.experts.down_proj", ("mlp.experts.{expert}.w2.weight",)),
)
MIXTRAL_NAMES = (("block_sparse_moe.", "mlp."),)
GRANITE_NAMES = (
    ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
    ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
)


def _sees(model_type: str, prefix: str, module: str, fused: tuple[Fused, ...] = ()) -> Family:
    """The text model of one that also sees. Its positions have three parts, which are the same for text."""
    return Family(
        model_type,
        prefix,
        module=module,
        config_class=f"{prefix}TextConfig",
        decoder_class=f"{prefix}TextModel",
        fused=fused,
        sees=True,
    )


_EXAONE_NAMES = (
    ("h.", "layers."),
    ("attn.attention.", "self_attn."),
    ("self_attn.out_proj.", "self_attn.o_proj."),
    ("ln_1.", "input_layernorm."),
    ("ln_2.", "post_attention_layernorm."),
    ("mlp.c_fc_0.", "mlp.gate_proj."),
    ("mlp.c_fc_1.", "mlp.up_proj."),
    ("mlp.c_proj.", "mlp.down_proj."),
    ("wte.", "embed_tokens."),
    ("ln_f.", "norm."),
)

ROWS = (
    # Llama's shape: a row says only where the classes are.
    Family("llama", "Llama"),
    Family("internlm3", "Llama", module="llama", config_module="internlm3", config_class="InternLM3Config"),
    Family("iquestcoder", "Llama", module="llama", config_module="iquestcoder", config_class="IQuestCoderConfig"),
    Family(
        "exaone",
        "Llama",
        module="llama",
        config_module="exaone",
        config_class="ExaoneConfig",
        stored_layers="h",
        renamed=_EXAONE_NAMES,
    ),
    _sees("qwen2_vl_text", "Qwen2VL", "qwen2_vl"),
    _sees("qwen2_5_vl_text", "Qwen2_5_VL", "qwen2_5_vl"),
    _sees("qwen3_vl_text", "Qwen3VL", "qwen3_vl"),
    _sees("qwen3_vl_moe_text", "Qwen3VLMoe", "qwen3_vl_moe"),
    # The thinkers of models that also speak.
    Family(
        "qwen2_5_omni_text",
        "Qwen2_5Omni",
        module="qwen2_5_omni",
        config_class="Qwen2_5OmniTextConfig",
        decoder_class="Qwen2_5OmniThinkerTextModel",
        stored_under=("thinker.model.",),
        sees=True,
    ),
    Family(
        "qwen3_omni_moe_text",
        "Qwen3OmniMoe",
        module="qwen3_omni_moe",
        config_class="Qwen3OmniMoeTextConfig",
        decoder_class="Qwen3OmniMoeThinkerTextModel",
        stored_under=("thinker.model.",),
        fused=EXPERTS,
        sees=True,
    ),
    _sees("glm4v_text", "Glm4v", "glm4v"),
    _sees("glm4v_moe_text", "Glm4vMoe", "glm4v_moe", EXPERTS),
    Family("apertus", "Apertus"),
    Family("apertus1p5_text", "Apertus1p5Text", module="apertus1p5"),
    Family("arcee", "Arcee"),
    Family("bitnet", "BitNet"),
    Family("cohere", "Cohere"),
    Family("cohere2", "Cohere2"),
    # Only its text model: images would need positions with three parts.
    Family(
        "cohere_compass_text",
        "CohereCompass",
        module="cohere_compass",
        config_class="CohereCompassTextConfig",
        decoder_class="CohereCompassTextModel",
        # Before, its frequencies were in another order.
        since="5.21",
    ),
    Family("cwm", "Cwm"),
    Family(
        "emu3_text_model",
        "Emu3",
        module="emu3",
        config_class="Emu3TextConfig",
        decoder_class="Emu3TextModel",
        stored_under=("text_model.model.", "model.text_model."),
    ),
    Family("ernie4_5", "Ernie4_5"),
    Family("exaone4", "Exaone4"),
    Family("gemma", "Gemma"),
    Family("gemma2", "Gemma2"),
    Family("gemma3_text", "Gemma3", module="gemma3", config_class="Gemma3TextConfig", decoder_class="Gemma3TextModel"),
    Family("glm", "Glm"),
    Family("glm4", "Glm4"),
    Family("granite", "Granite", embedding_scale="embedding_multiplier"),
    Family("granite_swa", "GraniteSWA", embedding_scale="embedding_multiplier"),
    Family("helium", "Helium"),
    Family("hunyuan_v1_dense", "HunYuanDenseV1"),
    Family("hyperclovax", "HyperCLOVAX", embedding_scale="embedding_multiplier"),
    Family("jais2", "Jais2"),
    Family("ministral", "Ministral"),
    Family("ministral3", "Ministral3", uniform_window=True),
    Family("mistral", "Mistral", uniform_window=True),
    # Its norm has no weights, and is applied to the embeddings too.
    Family("nanochat", "NanoChat", embedding_norm="norm"),
    Family("nemotron", "Nemotron"),
    Family("olmo", "Olmo"),
    Family("olmo2", "Olmo2"),
    Family("olmo3", "Olmo3"),
    Family("persimmon", "Persimmon", norm="final_layernorm"),
    Family("phi", "Phi", norm="final_layernorm"),
    Family("phi3", "Phi3", uniform_window=True),
    Family("qwen2", "Qwen2"),
    Family("qwen3", "Qwen3"),
    Family("seed_oss", "SeedOss"),
    Family("smollm3", "SmolLM3"),
    Family("stablelm", "StableLm"),
    Family("starcoder2", "Starcoder2", uniform_window=True),
    Family("vaultgemma", "VaultGemma"),
    # Mixtures of experts.
    Family("afmoe", "Afmoe", fused=EXPERTS, root_scale_switch="mup_enabled"),
    Family(
        "aria_text",
        "AriaText",
        module="aria",
        renamed=(
            ("mlp.experts.fc1.weight", "mlp.experts.gate_up_proj"),
            ("mlp.experts.fc2.weight", "mlp.experts.down_proj"),
        ),
    ),
    Family("beam", "Beam", fused=EXPERTS),
    Family("cohere2_moe", "Cohere2Moe", fused=EXPERTS),
    Family("dbrx", "Dbrx", layers="blocks", norm="norm_f", embeddings="wte"),
    Family("dots1", "Dots1", fused=EXPERTS),
    Family(
        "ernie4_5_moe",
        "Ernie4_5_Moe",
        fused=EXPERTS,
        renamed=(("mlp.moe_statics.e_score_correction_bias", "mlp.gate.moe_statics.e_score_correction_bias"),),
    ),
    Family(
        "exaone_moe",
        "ExaoneMoe",
        fused=EXPERTS,
        renamed=(("mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),),
    ),
    Family("flex_olmo", "FlexOlmo", fused=EXPERTS),
    Family("flint", "Flint", fused=EXPERTS, renamed=(("self_attn.softmax_offset", "self_attn.sinks"),)),
    Family("glm4_moe", "Glm4Moe", fused=EXPERTS),
    Family("gpt_oss", "GptOss"),
    Family("granitemoe", "GraniteMoe", renamed=GRANITE_NAMES, embedding_scale="embedding_multiplier"),
    Family("granitemoe_swa", "GraniteMoeSWA", embedding_scale="embedding_multiplier"),
    Family("granitemoeshared", "GraniteMoeShared", renamed=GRANITE_NAMES, embedding_scale="embedding_multiplier"),
    Family("hunyuan_v1_moe", "HunYuanMoEV1", fused=EXPERTS),
    Family(
        "hy_v3",
        "HYV3",
        fused=EXPERTS,
        renamed=(
            ("mlp.router.gate.weight", "mlp.gate.weight"),
            ("mlp.expert_bias", "mlp.e_score_correction_bias"),
            ("mlp.shared_mlp.", "mlp.shared_experts."),
        ),
    ),
    # Transformers' interface hides some of its attention's query heads from us, so its rows run one by one.
    Family("jetmoe", "JetMoe", attention_interface=False),
    Family(
        "kolibri1",
        "Kolibri1",
        fused=EXPERTS,
        renamed=(
            ("moe.router.expert_bias", "mlp.gate.e_score_correction_bias"),
            ("post_attn_norm", "post_self_attn_layernorm"),
            ("post_ffn_norm", "post_mlp_layernorm"),
        ),
    ),
    Family(
        "laguna",
        "Laguna",
        fused=EXPERTS,
        renamed=(
            ("mlp.experts.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
            ("mlp.shared_expert.", "mlp.shared_experts."),
        ),
    ),
    Family(
        "llama4_text",
        "Llama4",
        module="llama4",
        config_class="Llama4TextConfig",
        decoder_class="Llama4TextModel",
        decoder_at="model",
    ),
    Family("mellum", "Mellum", fused=EXPERTS),
    Family(
        "mimo_v2_flash",
        "MiMoV2Flash",
        fused=EXPERTS,
        renamed=(("self_attn.attention_sink_bias", "self_attn.sinks"),),
    ),
    Family("minimax_m2", "MiniMaxM2", renamed=MIXTRAL_NAMES, fused=MIXTRAL_EXPERTS),
    Family("mixtral", "Mixtral", renamed=MIXTRAL_NAMES, fused=MIXTRAL_EXPERTS, uniform_window=True),
    Family("olmoe", "Olmoe", fused=EXPERTS),
    Family(
        "phimoe",
        "Phimoe",
        renamed=(*MIXTRAL_NAMES, ("mlp.gate.weight", "mlp.router.weight")),
        fused=MIXTRAL_EXPERTS,
        uniform_window=True,
    ),
    Family("qwen2_moe", "Qwen2Moe", fused=EXPERTS),
    Family("qwen3_moe", "Qwen3Moe", fused=EXPERTS, uniform_window=True),
    Family("solar_open", "SolarOpen", fused=EXPERTS),
    # Compressed latents in the cache (MLA).
    Family("axk1", "AXK1", fused=EXPERTS, renamed=(("post_mlp_layernorm", "mlp.post_mlp_layernorm"),), latent=True),
    Family("deepseek_v2", "DeepseekV2", fused=EXPERTS, latent=True),
    Family("deepseek_v3", "DeepseekV3", fused=EXPERTS, latent=True),
    Family("glm4_moe_lite", "Glm4MoeLite", fused=EXPERTS, latent=True),
    Family("minicpm3", "MiniCPM3", latent=True),
    Family("mistral4", "Mistral4", fused=EXPERTS, latent=True),
    Family(
        "sarvam_mla",
        "DeepseekV3",
        module="deepseek_v3",
        config_module="sarvam_mla",
        config_class="SarvamMLAConfig",
        fused=EXPERTS,
        latent=True,
    ),
    Family("youtu", "Youtu", latent=True),
    # The head adds positions to the embeddings.
    Family(
        "biogpt",
        "BioGpt",
        norm="layer_norm",
        positions="embed_positions",
        position_offset=2,
        lm_head="output_projection",
        stored_under=("biogpt.",),
    ),
    Family("gpt2", "GPT2", layers="h", norm="ln_f", embeddings="wte", positions="wpe", causal_class="GPT2LMHeadModel"),
    Family("gpt_bigcode", "GPTBigCode", layers="h", norm="ln_f", embeddings="wte", positions="wpe"),
    Family(
        "gpt_neo",
        "GPTNeo",
        layers="h",
        norm="ln_f",
        embeddings="wte",
        positions="wpe",
        own_attention=True,
    ),
    Family(
        "opt",
        "OPT",
        norm="final_layer_norm",
        positions="embed_positions",
        position_offset=2,
        project_in="project_in",
        project_out="project_out",
        decoder_at="decoder",
        decoder_class="OPTDecoder",
    ),
    Family(
        "xglm",
        "XGLM",
        norm="layer_norm",
        positions="embed_positions",
        position_offset=2,
        attention_interface=False,
    ),
    # Their own attention code, not Transformers' interface.
    Family(
        "bloom",
        "Bloom",
        layers="h",
        norm="ln_f",
        embeddings="word_embeddings",
        embedding_norm="word_embeddings_layernorm",
        own_attention=True,
    ),
    Family("codegen", "CodeGen", layers="h", norm="ln_f", embeddings="wte", own_attention=True),
    Family("diffllama", "DiffLlama", attention_interface=False),
    Family("doge", "Doge", attention_interface=False),
    Family("falcon", "Falcon", layers="h", norm="ln_f", embeddings="word_embeddings", own_attention=True),
    Family("gpt_neox", "GPTNeoX", norm="final_layer_norm", embeddings="embed_in"),
    Family(
        "gpt_neox_japanese",
        "GPTNeoXJapanese",
        norm="final_layer_norm",
        embeddings="embed_in",
        lm_head="embed_out",
        own_attention=True,
        stored_under=("gpt_neox_japanese.",),
    ),
    Family("gptj", "GPTJ", layers="h", norm="ln_f", embeddings="wte", own_attention=True),
    Family("mpt", "Mpt", layers="blocks", norm="norm_f", embeddings="wte", own_attention=True),
)
