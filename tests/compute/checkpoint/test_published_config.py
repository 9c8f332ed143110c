"""Settings that publishers leave in odd places are found; settings that would change the result are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import CheckpointError, UnsupportedModelError
from peerd.compute.model.head import load_head
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span

TinyCheckpoint = Callable[[str], Path]


def changed(
    source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object] = len, **fields: Any
) -> Path:
    """A copy with other tensors and other fields in its configuration; a field of `...` is taken out."""
    copied = Path(shutil.copytree(source, target))
    config = json.loads((copied / "config.json").read_text()) | fields
    kept = {name: value for name, value in config.items() if value is not ...}
    (copied / "config.json").write_text(json.dumps(kept))
    tensors = load_file(copied / "model.safetensors")
    change(tensors)
    save_file(tensors, copied / "model.safetensors")
    return copied


def cast(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    return change


@pytest.mark.parametrize(
    ("outer", "inner", "stored", "expected"),
    [
        ({"dtype": "bfloat16"}, {}, torch.bfloat16, torch.bfloat16),
        ({"torch_dtype": "float16"}, {"dtype": "float32"}, torch.float16, torch.float16),
        ({}, {"dtype": "bfloat16"}, torch.float32, torch.bfloat16),
        ({}, {}, torch.bfloat16, torch.bfloat16),
        ({}, {}, torch.float16, torch.float16),
        ({}, {}, torch.float64, torch.float32),
        ({"dtype": "float8_e4m3fn"}, {}, torch.bfloat16, torch.bfloat16),
        ({"dtype": "int8"}, {}, torch.float32, torch.float32),
        ({"dtype": "float64"}, {}, torch.float64, torch.float32),
    ],
)
def test_the_dtype_is_the_outer_configurations_or_else_the_tensors(
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
    outer: dict[str, str],
    inner: dict[str, str],
    stored: torch.dtype,
    expected: torch.dtype,
) -> None:
    source = changed(tiny_checkpoint("llama"), tmp_path / "a", cast(stored), dtype=...)
    text = json.loads((source / "config.json").read_text()) | inner
    (source / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text} | outer))
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.dtype == expected
        assert load_span(checkpoint, Span(0, 1)).dtype == expected
        load_head(checkpoint)


@pytest.mark.parametrize(
    ("rope", "stated", "expected"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 64, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256, 256),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 256, 256),
        ({"rope_type": "dynamic", "factor": 4.0}, 64, 256),
        ({"rope_type": "linear", "factor": 2.0}, 64, 128),
        ({"rope_type": "default"}, 64, 64),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            512,
            512,
        ),
    ],
)
def test_the_longest_text_follows_from_what_the_rope_was_scaled_by(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, rope: dict[str, Any], stated: int, expected: int
) -> None:
    rope = rope | {"rope_theta": 500.0}
    path = changed(tiny_checkpoint("llama"), tmp_path / "a", max_position_embeddings=stated, rope_parameters=rope)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.max_length == expected


def test_a_model_whose_blocks_see_later_positions_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """As gte-Qwen2 says it, and other models that make embeddings of texts."""
    with pytest.raises(UnsupportedModelError, match="attend to later positions"):
        open_checkpoint(changed(tiny_checkpoint("qwen2"), tmp_path / "a", is_causal=False))


def test_billions_of_blocks_are_refused_before_they_are_listed(tmp_path: Path) -> None:
    """Gemma 3's configuration makes a list of all blocks' types, which would take all memory."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "num_hidden_layers": 2**32 - 1}))
    with pytest.raises(CheckpointError, match="num_hidden_layers is 4294967295; peerd serves models of up to 4096"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("place", ["mtp.", "medusa.0.", "talker.", "model.layers.0.", "model.draft."])
def test_a_head_that_is_not_the_models_own_is_left_alone(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, place: str
) -> None:
    source = tiny_checkpoint("llama")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{place}lm_head.weight"] = -tensors["lm_head.weight"]

    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with open_checkpoint(source) as plain, open_checkpoint(changed(source, tmp_path / "a", add)) as more:
        torch.testing.assert_close(load_head(more).logits(hidden), load_head(plain).logits(hidden), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("decoder", "head"),
    [
        ("model.", "lm_head."),
        ("language_model.model.", "language_model.lm_head."),
        ("model.language_model.", "lm_head."),
        ("model.text_model.", "lm_head."),
        ("model.", "model.lm_head."),
    ],
)
def test_a_head_is_found_above_the_decoder(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, decoder: str, head: str
) -> None:
    source = tiny_checkpoint("llama")

    def move(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensor = tensors.pop(name)
            tensors[name.replace("model.", decoder, 1) if "model." in name else f"{head}weight"] = tensor

    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with open_checkpoint(source) as plain, open_checkpoint(changed(source, tmp_path / "a", move)) as moved:
        torch.testing.assert_close(load_head(moved).logits(hidden), load_head(plain).logits(hidden), rtol=0, atol=0)
        assert moved.names_of_block(3) == plain.names_of_block(3)


def test_of_a_tied_pair_the_head_alone_may_be_stored(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama_tied")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with open_checkpoint(source) as plain, open_checkpoint(changed(source, tmp_path / "a", rename)) as other:
        one, two = load_head(plain), load_head(other)
        torch.testing.assert_close(two.logits(hidden), one.logits(hidden), rtol=0, atol=0)
        torch.testing.assert_close(two.embed(torch.tensor([3, 4])), one.embed(torch.tensor([3, 4])), rtol=0, atol=0)
        assert two.model.lm_head.weight is two.embedding_weight


def test_without_a_tie_a_missing_embedding_is_an_error(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    path = changed(tiny_checkpoint("llama"), tmp_path / "a", lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(CheckpointError, match=r"embed_tokens\.weight is missing"),
    ):
        load_head(checkpoint)


def test_a_tensor_of_another_shape_is_named_with_its_block(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    path = changed(tiny_checkpoint("llama"), tmp_path / "a", intermediate_size=40)
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(CheckpointError, match=r"tensor layers\.5\.mlp\.\w+_proj\.weight has shape \[48, 32\]"),
    ):
        load_span(checkpoint, Span(5, 6))


def test_what_another_architecture_has_in_its_configuration_changes_nothing(tmp_path: Path) -> None:
    """These share no keys between heads, whatever their configuration was given beside its own fields."""
    from peerd.compute.families.lookup import FAMILIES
    from tests.compute.engine_chain import LENGTH, TOLERANCE, Chain, Part, Reference
    from tests.compute.tiny_families import tiny_model

    # Transformers' rotary embeddings do read `head_dim`, also in families that have no such field.
    without_rotary = {"num_key_value_heads": 2, "head_dim": 4}
    cases = {"gpt2": without_rotary, "opt": without_rotary}
    cases |= {name: {"num_key_value_heads": 2} for name in ("gpt_neox", "persimmon")}
    for name, more in cases.items():
        model = tiny_model(FAMILIES[name])
        model.save_pretrained(tmp_path / name)
        path = changed(tmp_path / name, tmp_path / f"{name} more", **more)
        with open_checkpoint(path) as checkpoint:
            hidden = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(0))
            chain = Chain(Reference(checkpoint, hidden, hidden))
            chain.open("a")
            got = chain.run(Part("a", 0, 0, 0, LENGTH))
        with open_checkpoint(tmp_path / name) as checkpoint:
            chain = Chain(Reference(checkpoint, hidden, hidden))
            chain.open("a")
            torch.testing.assert_close(got, chain.run(Part("a", 0, 0, 0, LENGTH)), **TOLERANCE)
