"""The head of every family: tied or not, in half precision, from any position on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.families.family import Family
from peerd.compute.families.lookup import FAMILIES
from peerd.compute.model.head import Head, load_head, load_input_side, load_output_side
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span
from tests.compute.tiny_families import _OWN, VARIANTS, or_skip, tiny_model

TOKENS = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(0))
#: OPT of 350M norms after each block rather than at the end.
LATER_NORM = ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 24, "do_layer_norm_before": False})


def shortened(family: Family, fields: dict[str, Any]) -> Any:
    """A tiny model of one block: that is all that lies between the two ends of a head."""
    model = tiny_model(family, fields)
    decoder = model.base_model.get_submodule(family.decoder_at)
    setattr(decoder, family.layers, getattr(decoder, family.layers)[:1])
    return model


def run_whole(model: Any, family: Family) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What enters its block, what leaves it, and the logits. The decoder's output is kept as `decoder.given`."""
    decoder = model.base_model.get_submodule(family.decoder_at)
    decoder.register_forward_hook(lambda decoder, _, output: setattr(decoder, "given", output.last_hidden_state[0]))
    block = getattr(model.base_model.get_submodule(family.decoder_at), family.layers)[0]
    seen: list[torch.Tensor] = []
    block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).clone()), with_kwargs=True
    )
    block.register_forward_hook(lambda _, __, output: seen.append(output[0] if type(output) is tuple else output))
    with torch.no_grad():
        logits = model(TOKENS[None]).logits
    return seen[0][0], seen[1][0], logits[0]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_head_may_be_tied_or_not_and_half_precision_whatever_its_family_does(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    kind: Any = or_skip(family.config_type)
    # Dbrx's configuration refuses ties.
    tied = name != "dbrx" and not getattr(kind(), "tie_word_embeddings", False)
    model = shortened(family, {**_OWN.get(name, {}), "tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    entering, leaving, logits = run_whole(model, family)
    with open_checkpoint(tmp_path) as checkpoint:
        head, half = load_head(checkpoint), load_head(checkpoint, dtype=torch.bfloat16)
        first, last = Head(load_input_side(checkpoint).model, family), load_output_side(checkpoint)
        embedded = first.embed(TOKENS)
    torch.testing.assert_close(head.embed(TOKENS), entering, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.logits(leaving), logits, rtol=1e-5, atol=1e-5)
    given = model.base_model.get_submodule(family.decoder_at).given
    torch.testing.assert_close(head.last_hidden(leaving), given, rtol=1e-5, atol=1e-5)
    # Transformers never ties some, whatever their configurations say.
    ties = tied and bool(family.causal_type()._tied_weights_keys)
    assert (getattr(head.model, family.lm_head).weight is head.embedding_weight) == ties
    # Each of its two sides alone does the same, and holds the other's matrix not at all.
    assert torch.equal(embedded, head.embed(TOKENS))
    assert torch.equal(last.logits(leaving), head.logits(leaving))
    assert len(first.embedding_weight) == len(last.embedding_weight) == 0
    assert first.vocab_size == last.vocab_size == head.vocab_size
    assert half.embed(TOKENS).dtype == torch.bfloat16
    near = half.logits(leaving)
    assert near.dtype == torch.float32
    assert (near - logits).abs().max() < 0.05 * logits.abs().max()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *((name, None) for name, family in sorted(FAMILIES.items()) if family.positions),
        VARIANTS["opt without projections"],
        LATER_NORM,
    ],
)
def test_tokens_are_embedded_for_the_positions_that_they_have(
    tmp_path: Path, name: str, fields: dict[str, Any] | None
) -> None:
    family = FAMILIES[name]
    model = shortened(family, _OWN.get(name, {}) if fields is None else fields)
    model.save_pretrained(tmp_path)
    entering, leaving, logits = run_whole(model, family)
    with open_checkpoint(tmp_path) as checkpoint:
        head = load_head(checkpoint)
        assert head.max_positions == checkpoint.max_length == 64
    torch.testing.assert_close(head.embed(TOKENS), entering, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.embed(TOKENS[7:], torch.arange(7, 40)), entering[7:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(head.embed(TOKENS[7:]), entering[7:], atol=1e-2)
    torch.testing.assert_close(head.logits(leaving), logits, rtol=1e-5, atol=1e-5)


_TEXT = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
#: A multimodal model -> its parts, as its configuration names them.
WRAPPED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("Gemma3", {}, {}),
    "llava": ("Llava", {"model_type": "llama"}, {"model_type": "clip_vision_model"}),
    "mistral3": ("Mistral3", {"model_type": "mistral"}, {"model_type": "pixtral", "head_dim": 8}),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", sorted(WRAPPED))
def test_the_whole_of_a_multimodal_model_says_whether_its_head_is_tied(tmp_path: Path, name: str, tied: bool) -> None:
    import transformers

    prefix, text, vision = WRAPPED[name]
    config = getattr(transformers, f"{prefix}Config")(
        text_config={**_TEXT, **text, "tie_word_embeddings": not tied},
        vision_config={**_VISION, **vision},
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(tmp_path)
        with open_checkpoint(tmp_path) as checkpoint:
            head, span = load_head(checkpoint), load_span(checkpoint, Span(0, 2))
        logits = head.logits(span.forward_no_cache(head.embed(TOKENS)[None])[0])
        torch.testing.assert_close(logits, model(TOKENS[None]).logits[0], rtol=1e-4, atol=1e-4)
    # Llava's own configuration takes the text model's word for it.
    assert (head.model.lm_head.weight is head.embedding_weight) == model.config.tie_word_embeddings
