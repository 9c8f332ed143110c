"""Files that peft wrote are read. Files that strangers wrote are read or refused with a reason, and never run code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from peerd.compute.adapters.config import parse_config
from peerd.compute.adapters.file import open_adapter
from peerd.compute.errors import AdapterError
from peerd.compute.families.lookup import family_named
from peerd.protocol.span import Span

LLAMA = family_named("llama")
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
Q_PROJ = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"

WriteAdapter = Callable[..., Path]


def matrices(blocks: int = 2, rank: int = 2, width: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        Q_PROJ.format(block, side): torch.randn(shape, generator=generator)
        for block in range(blocks)
        for side, shape in (("A", (rank, width)), ("B", (width, rank)))
    }


def write(folder: Path, config: Any = CONFIG, tensors: Mapping[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(matrices() if tensors is None else tensors), folder / "adapter_model.safetensors")
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(AdapterError) as caught, open_adapter(folder, LLAMA) as file:
        file.read()
    return str(caught.value)


def test_an_adapter_is_read_block_by_block_with_its_scale(tmp_path):
    with open_adapter(write(tmp_path), LLAMA) as file:
        assert file.modules == {(0, "self_attn.q_proj"): (8, 8), (1, "self_attn.q_proj"): (8, 8)}
        assert file.n_bytes() == 2 * file.n_bytes(Span(1, 2)) == 2 * 2 * 2 * 8 * 4
        ((key, pair),) = file.read(Span(1, 2)).items()
    assert key == (1, "self_attn.q_proj")
    assert pair.scale == 2.0
    torch.testing.assert_close(pair.a, matrices()[Q_PROJ.format(1, "A")])


def test_a_pickled_adapter_is_never_opened(tmp_path):
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "is a pickle, which runs whatever code is in it" in refusal(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes((tmp_path / "adapter_model.bin").read_bytes())
    refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_is_missing_is_said(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "has no adapter_model.safetensors" in refusal(tmp_path)
    folder = write(tmp_path / "adapter")
    assert "is a file" in refusal(folder / "adapter_config.json")
    (folder / "adapter_config.json").unlink()
    assert "cannot be read" in refusal(folder)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is run"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "'use_dora' = True is not run: DoRA"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save' = .* is not run"),
        ({"bias": "lora_only"}, "bias = 'lora_only' is not run"),
        ({"lora_bias": True}, "'lora_bias'"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "'target_parameters' = .*experts"),
        ({"trainable_token_indices": [1]}, "'trainable_token_indices'"),
        ({"layer_replication": [[0, 4], [2, 6]]}, "'layer_replication'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not run"),
        ({"something_new": {"a": 1}}, "'something_new' = .* is not run"),
        ({"r": 0}, "r: 0: a rank is from 1"),
        ({"r": True}, "r: True"),
        ({"r": 3}, "which do not have rank 3"),
        ({"lora_alpha": float("inf")}, "lora_alpha: inf: a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"target_modules": None}, "target_modules: None"),
        ({"layers_to_transform": ["one"]}, "layers_to_transform"),
        ({"rank_pattern": {"q_proj": 3}}, "which do not have rank 3"),
        ({"alpha_pattern": {"(": 3}}, "malformed, or could take forever"),
        ({"alpha_pattern": {"(.*a)*b": 3}}, "malformed, or could take forever"),
        ({"alpha_pattern": {".*.*.*.*b": 3}}, "malformed, or could take forever"),
    ],
)
def test_what_we_do_not_run_exactly_is_refused_by_name(tmp_path, fields, reason):
    folder = write(tmp_path / "adapter", CONFIG | fields)
    with pytest.raises(AdapterError, match=reason), open_adapter(folder, LLAMA):
        pass


def test_fields_that_change_no_result_are_allowed(tmp_path):
    harmless = {
        "lora_dropout": 0.1,
        "fan_in_fan_out": True,
        "init_lora_weights": "gaussian",
        "base_model_name_or_path": "somebody/model",
        "use_qalora": False,
        "something_new": None,
        "task_type": "CAUSAL_LM",
    }
    with open_adapter(write(tmp_path, CONFIG | harmless), LLAMA) as file:
        assert len(file.modules) == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("base_model.model.lm_head.lora_A.weight", "lm_head, which is no part of a block"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embeddings are the client's"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        ("base_model.model.model.layers.0.self_attn.q_proj.bias", "biases"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight", "it is no LoRA matrix"),
        ("model.layers.0.self_attn.k_proj.lora_A.weight", "it is no LoRA matrix"),
        ("base_model.model.model.layers.5.self_attn.q_proj.lora_A.weight", "only one of its two"),
        ("base_model.model.model.layers.9999.self_attn.k_proj.lora_A.weight", "no part of a block"),
        ("base_model.model.vision.layers.0.self_attn.k_proj.lora_A.weight", "no part of a block"),
    ],
)
def test_a_tensor_that_would_have_to_be_left_out_is_refused(tmp_path, name, reason):
    assert reason in refusal(write(tmp_path / "adapter", tensors={**matrices(), name: torch.zeros(2, 8)}))


def test_a_layer_may_not_come_twice(tmp_path):
    again = {name.replace("model.layers.0", "layers.0"): tensor for name, tensor in matrices(1).items()}
    assert "under two names" in refusal(write(tmp_path / "adapter", tensors={**matrices(1), **again}))


def test_values_shapes_and_types_are_checked(tmp_path):
    name = Q_PROJ.format(0, "A")
    for tensor, reason in (
        (torch.zeros(2, 8, dtype=torch.int32), "not a matrix of floats"),
        (torch.zeros(16), "not a matrix of floats"),
        (torch.zeros(3, 8), "do not have rank 2"),
        (torch.zeros(2, 8, dtype=torch.bfloat16), "do not have rank 2"),
        (torch.full((2, 8), torch.nan), "not finite"),
    ):
        assert reason in refusal(write(tmp_path / "adapter", tensors=matrices() | {name: tensor}))


def test_the_digest_follows_weights_and_scales_and_nothing_else(tmp_path):
    def digest(config: Any = CONFIG, tensors: Mapping[str, torch.Tensor] | None = None) -> bytes:
        with open_adapter(write(tmp_path / "adapter", config, tensors), LLAMA) as file:
            return file.digest

    first = digest()
    assert len(first) == 32
    assert digest(CONFIG | {"base_model_name_or_path": "elsewhere", "lora_alpha": 4.0}) == first
    assert digest(CONFIG | {"lora_alpha": 5}) != first
    assert digest(CONFIG | {"use_rslora": True}) != first
    assert digest(tensors={name: 2 * tensor for name, tensor in matrices().items()}) != first


# Anything that JSON can hold, in the fields that are read.
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)
_FIELDS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "layers_to_transform", "use_dora")


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*_FIELDS, "init_lora_weights", "bias", "exclude_modules"]), _json))
def test_any_configuration_is_read_or_refused(fields):
    try:
        config = parse_config(CONFIG | fields, "somewhere")
    except AdapterError:
        return
    assert abs(config.scale_of("model.layers.0.self_attn.q_proj")) >= 0


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_damage_to_the_files_is_refused_or_harmless(tmp_path_factory, data):
    folder = write(tmp_path_factory.getbasetemp() / "damaged")
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        with open_adapter(folder, LLAMA) as file:
            lora = file.read()
    except AdapterError:
        return
    assert all(pair.a.isfinite().all() and pair.b.isfinite().all() for pair in lora.values())


def test_a_long_pattern_over_long_names_ends(tmp_path):
    # As bad as what is allowed: two repeats beside the one that peft puts before.
    config = parse_config(CONFIG | {"alpha_pattern": {"a*a*b": 1}}, "somewhere")
    assert config.scale_of("a" * 150) == 2.0
