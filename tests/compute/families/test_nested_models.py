"""Models that also process images or sound: their language model is opened, cut and run for text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.families.lookup import FAMILIES
from peerd.compute.model.head import load_head
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span
from tests.compute.tiny_families import tiny_config

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _gemma3(text: Any) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {**_VISION, "model_type": "siglip_vision_model"}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def _llama4(text: Any) -> Any:
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    vision = {**_VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    return Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision))


def _mistral3(text: Any) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    vision = {**_VISION, "model_type": "pixtral", "head_dim": 8}
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))


def _llava(text: Any) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {**_VISION, "model_type": "clip_vision_model", "projection_dim": 16}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))


_SEES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 8, "image_size": 16}


def _qwen2_5_vl(text: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {**_SEES, "out_hidden_size": 32}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text.to_dict(), vision_config=vision))


def _qwen2_vl(text: Any) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 8}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text.to_dict(), vision_config=vision))


def _qwen3_vl(text: Any) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {**_SEES, "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text.to_dict(), vision_config=vision))


def _qwen3_vl_moe(text: Any) -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    vision = {**_SEES, "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text.to_dict(), vision_config=vision))


def _glm4v(text: Any) -> Any:
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    vision = {**_SEES, "out_hidden_size": 32}
    return Glm4vForConditionalGeneration(Glm4vConfig(text_config=text.to_dict(), vision_config=vision))


def _glm4v_moe(text: Any) -> Any:
    from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

    vision = {**_SEES, "out_hidden_size": 32}
    return Glm4vMoeForConditionalGeneration(Glm4vMoeConfig(text_config=text.to_dict(), vision_config=vision))


_WRAPPERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "gemma3": ("gemma3_text", _gemma3),
    "llama4": ("llama4_text", _llama4),
    "mistral3": ("mistral", _mistral3),
    "llava of a qwen2": ("qwen2", _llava),
    "qwen2_vl": ("qwen2_vl_text", _qwen2_vl),
    "qwen2_5_vl": ("qwen2_5_vl_text", _qwen2_5_vl),
    "qwen3_vl": ("qwen3_vl_text", _qwen3_vl),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", _qwen3_vl_moe),
    "glm4v": ("glm4v_text", _glm4v),
    "glm4v_moe": ("glm4v_moe_text", _glm4v_moe),
}


@pytest.mark.parametrize("name", _WRAPPERS)
def test_the_language_model_inside_another_is_cut_as_if_it_were_alone(name: str, tmp_path: Path) -> None:
    family, wrap = _WRAPPERS[name]
    torch.manual_seed(7)
    model = wrap(tiny_config(FAMILIES[family])).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1))
        tokens = torch.randint(3, 90, (20,), generator=torch.Generator().manual_seed(0))
        # Llama 4's outer forward fails without an image in Transformers 5.24: the language model in it is asked itself.
        whole = model.language_model if name == "llama4" else model
        expected = whole(input_ids=tokens[None]).logits[0]
    model.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.family.model_type == family
        head = load_head(checkpoint)
        hidden = head.embed(tokens)[None]
        for span in (Span(0, 3), Span(3, 8)):
            with torch.no_grad():
                hidden = load_span(checkpoint, span, attention="eager").forward_no_cache(hidden)
    torch.testing.assert_close(head.logits(hidden[0]), expected, rtol=1e-4, atol=1e-4)
