"""The architectures that cannot be served, with the reasons that `family_named` gives.

A hop passes hidden states of one width to the next hop, and a session can go back to an earlier position. An
architecture that needs to pass more, or whose blocks keep of a row what peerd does not keep yet, is refused by name.
Together with the table of families this covers every causal language model of Transformers
(`tests/compute/families/test_refused.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_SHARES_KV = "its blocks share KV caches and take per-layer inputs"
_DRAFTS = "it drafts for another model, from that model's hidden states and KV caches"
_ZAMBA = "its blocks share one attention block and take the embeddings again"
_OWN_CACHE = "its decoder takes no KV cache but one of its own class"
_INSIDE = "its recurrent blocks keep their state inside themselves, and lose it where several positions follow others"
_RESCALED = "its decoder scales states and hidden states by a block's number in the whole model"
_ROUTED_ON = "its routers pass a state of their own from block to block, beside the hidden states"
_CONVOLVES = "each of its blocks runs several convolutions around attention, and scores positions by their distance"
_RESIDUALS = "its blocks attend to the outputs of earlier blocks"
_FUSED_PROJECTIONS = "its {} are stored in one tensor, which peerd does not take apart"
_INDEXED = "its sparse attention keeps an index of past positions beside keys and values"
_STREAMS = "its blocks pass several residual streams to each other, not one"
_ENCODER = "it is an encoder: its blocks were trained to see later positions too"
_CROSS = "it is the decoder of an encoder-decoder model: its blocks attend to an encoder's output"
_SPEECH = "it is a speech model: its blocks take codes of sound beside tokens"

_REASONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (_SHARES_KV, ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")),
    (_DRAFTS, ("gemma4_assistant", "gemma4_unified_assistant")),
    (_ZAMBA, ("zamba", "zamba2")),
    (_OWN_CACHE, ("minimax", "xlstm")),
    (_INSIDE, ("recurrent_gemma",)),
    (_RESCALED, ("rwkv",)),
    (_ROUTED_ON, ("zaya",)),
    (_CONVOLVES, ("inkling_text",)),
    (_RESIDUALS, ("inkling2_text",)),
    (
        _INDEXED,
        (
            "axk2",
            "deepseek_v32",
            "dots3_note",
            "dots3_note_text",
            "glm_moe_dsa",
            "minimax_m3_vl_text",
        ),
    ),
    (_STREAMS, ("deepseek_v4", "hy_v4", "qwen4_exp", "qwen4_exp_text")),
    ("each of its blocks attends twice, with a KV cache for each", ("longcat_flash",)),
    ("it runs its blocks over each token several times", ("dory", "hrm_text", "inkling2_loop_text")),
    (_FUSED_PROJECTIONS.format("queries, keys and values"), ("sarvam_moe",)),
    (_FUSED_PROJECTIONS.format("projections of linear attention"), ("lara_mini",)),
    ("its blocks work on patches of bytes, which smaller models make and take apart", ("blt",)),
    ("some of its blocks attend to an image", ("mllama",)),
    ("its blocks take an image before the text, and let both see all of the image", ("git",)),
    ("its embeddings are mixed with images and sound, by adapters of their own", ("phi4_multimodal",)),
    (_SPEECH, ("moshi", "musicgen", "musicgen_melody")),
    ("it keeps no keys and values: each token would compute the whole text again", ("openai-gpt",)),
    ("its positions are no module of its decoder, which scales embeddings and adds them in one place", ("ctrl",)),
    ("its head is more than a norm and a linear map", ("modernbert-decoder",)),
    ("its positions are relative to prompts that it was trained with", ("cpmant",)),
    ("its blocks pass two streams, and cache hashes of what they attend to", ("reformer",)),
    ("it predicts permuted text: its blocks pass two streams", ("xlnet",)),
    ("it has no list of blocks: their attentions, norms and feed-forwards lie in lists of their own", ("xlm",)),
    (
        _ENCODER,
        (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        ),
    ),
    (
        _CROSS,
        (
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "mvp",
            "pegasus",
            "plbart",
            "prophetnet",
            "trocr",
            "whisper",
        ),
    ),
)

REFUSED: Mapping[str, str] = MappingProxyType({name: reason for reason, names in _REASONS for name in names})

_REMOTE_CODE = "its code comes with its files, which peerd does not run, and Transformers has none of its own"
_UNTRIED = "its blocks have not been tried with peerd yet, although Transformers has them"
_CHOSEN = "its blocks share KV caches, and the positions that sparse attention has chosen"
_TWO_TABLES = "its embeddings are stored in two tables, and its decoder itself lists the ropes of its blocks"
_OUTER_HEAD = "its logits are scaled or capped by the model around its decoder, which peerd does not take apart"

NOT_SERVED: Mapping[str, str] = MappingProxyType(
    {
        name: reason
        for reason, names in (
            (
                _REMOTE_CODE,
                (
                    "baichuan",
                    "bailing_moe",
                    "chatglm",
                    "internlm2",
                    "internvl_chat",
                    "kimi_vl",
                    "minicpm",
                    "phi3small",
                    "qwen",
                    "telechat2",
                ),
            ),
            (_STREAMS, ("glm5_next", "glm5_next_text", "hy_v4_vl", "hy_v4_vl_text")),
            (_CHOSEN, ("mistral_large4", "mistral_large4_text")),
            (_TWO_TABLES, ("molmo2", "molmo2_text")),
            (_OUTER_HEAD, ("granite_docling", "granite_docling_text", "muse_glimmer", "muse_glimmer_text")),
            (
                _UNTRIED,
                (
                    "diffusion_gemma",
                    "ernie4_5_vl_moe_text",
                    "hunyuan_vl",
                    "hunyuan_vl_text",
                    "muse_spark",
                    "nemotron_h_omni",
                    "step3p5",
                ),
            ),
        )
        for name in names
    }
)
"""Others that people ask for: no causal language models of Transformers, or not by this name."""
