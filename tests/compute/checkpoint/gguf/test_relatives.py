"""Files of architectures that llama.cpp's converter has written in more than one way are read as the same models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerd.compute.checkpoint.gguf.architectures import architecture_of
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import CheckpointError, UnsupportedModelError
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span
from tests.compute.gguf_models import TINY, tiny_config, tiny_model
from tests.compute.gguf_writer import metadata_of, stored_tensors, write_gguf

Tensors = dict[str, Any]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a tiny model of `TINY`, with other metadata (None: without it) and other tensors."""

    def write(name: str, change: Callable[[Tensors], object] = len, **metadata: Any) -> Path:
        architecture = TINY[name][0]
        model = tiny_model(tiny_config(name))
        tensors = dict(stored_tensors(architecture, model))
        change(tensors)
        stated = {**metadata_of(architecture, model.config), **metadata}
        path = tmp_path / "tiny.gguf"
        write_gguf(path, architecture, {key: value for key, value in stated.items() if value is not None}, tensors)
        return path

    return write


@pytest.fixture
def nothing(tmp_path: Path) -> Callable[..., Any]:
    """Opens a file with these metadata and an embedding, and returns the configuration."""

    def config_of(name: str, **metadata: Any) -> Any:
        architecture = TINY[name][0]
        stated = {**metadata_of(architecture, tiny_config(name)), **metadata}
        kept = {key: value for key, value in stated.items() if value is not None}
        write_gguf(tmp_path / "bare.gguf", architecture, kept, {"token_embd.weight": np.zeros((96, 32))})
        with open_checkpoint(tmp_path / "bare.gguf") as checkpoint:
            return checkpoint.config

    return config_of


def whole_latents(name: str) -> Iterator[tuple[str, Any]]:
    """The matrices of keys and values as older converters store them: one tensor a block, as in Transformers."""
    for parameter, tensor in tiny_model(tiny_config(name)).state_dict().items():
        if parameter.endswith("kv_b_proj.weight"):
            yield f"blk.{parameter.split('.')[2]}.attn_kv_b.weight", tensor.float().numpy()


def test_latents_in_one_matrix_are_those_in_two(write: Write) -> None:
    name = "deepseek_v3"
    widths: Any = dict.fromkeys(f"attention.{part}_length_mla" for part in ("key", "value"))
    widths |= {"attention.key_length": 24, "attention.value_length": 12, "attention.head_count_kv": 4}

    def join(tensors: Tensors) -> None:
        for stored in [each for each in tensors if ".attn_k_b." in each or ".attn_v_b." in each]:
            del tensors[stored]
        tensors.update(whole_latents(name))

    found = []
    for change, metadata in ((len, {}), (join, widths)):
        with open_checkpoint(write(name, change, **metadata)) as checkpoint:
            found.append(dict(checkpoint.read(checkpoint.names_of_block(5))))
            assert checkpoint.config.v_head_dim == 12
    assert found[0].keys() == found[1].keys()
    assert all(found[0][parameter].equal(found[1][parameter]) for parameter in found[0])


def test_a_missing_half_of_the_latents_is_named(write: Write) -> None:
    path = write("deepseek_v2", lambda tensors: tensors.pop("blk.3.attn_v_b.weight"))
    with open_checkpoint(path) as checkpoint:
        load_span(checkpoint, Span(2, 3))
        with pytest.raises(CheckpointError, match=r"tensor blk\.3\.attn_v_b\.weight is missing"):
            load_span(checkpoint, Span(3, 4))


def test_half_of_the_latents_of_another_width_is_refused(write: Write) -> None:
    """One row a head would fill all rows."""
    one_row = {"blk.3.attn_v_b.weight": np.ones((4, 1, 16))}
    with (
        open_checkpoint(write("deepseek_v2", lambda tensors: tensors.update(one_row))) as checkpoint,
        pytest.raises(CheckpointError, match=r"blk\.3\.attn_v_b\.weight has shape \[4, 1, 16\], which its metadata"),
    ):
        load_span(checkpoint, Span(3, 4))


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_blocks_that_only_guess_further_tokens_are_left_out(write: Write, name: str) -> None:
    def add(tensors: Tensors) -> None:
        tensors["blk.8.attn_norm.weight"] = np.ones(32)
        tensors["blk.8.nextn.eh_proj.weight"] = np.ones((32, 64))

    with open_checkpoint(write(name, add, block_count=9, nextn_predict_layers=1)) as checkpoint:
        assert checkpoint.block_count == 8
        load_span(checkpoint, Span(7, 8))
    with pytest.raises(UnsupportedModelError, match=r"blk\.8\.attn_norm\.weight has no place"):
        open_checkpoint(write(name, add))


@pytest.mark.parametrize(("experts", "groups"), [(160, (8, 3)), (256, (8, 4)), (64, (1, 1))])
def test_files_that_state_no_groups_have_those_of_their_size(
    nothing: Callable[..., Any], experts: int, groups: tuple[int, int]
) -> None:
    unsaid: Any = dict.fromkeys(("expert_group_count", "expert_group_used_count"))
    config = nothing("deepseek_v2", expert_count=experts, **unsaid)
    assert (config.n_group, config.topk_group) == groups
    assert config.topk_method == ("greedy" if groups == (1, 1) else "group_limited_greedy")


def test_a_glm_that_states_no_groups_has_one(nothing: Callable[..., Any]) -> None:
    """GLM 4.5 and 4.6 have as many experts as DeepSeek V2, and files older than llama.cpp's groups."""
    unsaid: Any = dict.fromkeys(("expert_group_count", "expert_group_used_count"))
    config = nothing("glm4_moe", expert_count=160, **unsaid)
    assert (config.n_group, config.topk_group) == (1, 1)


def test_a_deepseek_of_other_arithmetic_is_refused(nothing: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="queries grow with their position"):
        nothing("deepseek_v3", **{"attention.temperature_scale": 0.1})
    with pytest.raises(UnsupportedModelError, match="weights are not those of a DeepSeek V2"):
        nothing("deepseek_v2", expert_weights_norm=True)
    with pytest.raises(CheckpointError, match="a head has width 8, of which 8 are turned"):
        nothing("deepseek_v2", **{"attention.key_length_mla": 8})


def test_a_glm_flash_that_does_not_say_how_it_chooses_experts_chooses_by_a_sigmoid() -> None:
    said = {"general.architecture": "deepseek2", "deepseek2.vocab_size": 154880}
    assert architecture_of(said, "here").model_type == "deepseek_v3"
    assert architecture_of(said | {"deepseek2.vocab_size": 102400}, "here").model_type == "deepseek_v2"


def test_a_llama_4_of_128_experts_does_not_normalise_queries(nothing: Callable[..., Any]) -> None:
    assert nothing("llama4").use_qk_norm
    assert not nothing("llama4", expert_count=128).use_qk_norm


def test_a_llama_4_without_a_window_turns_all_blocks(nothing: Callable[..., Any]) -> None:
    assert set(nothing("llama4").layer_types) == {"chunked_attention", "full_attention"}
    config = nothing("llama4", **{"attention.sliding_window": 0})
    assert set(config.layer_types) == {"full_attention"}
    assert all(config.no_rope_layers)


def test_a_llama_4_whose_factors_follow_no_rule_is_refused(write: Write) -> None:
    """Its rotary embeddings are complex numbers, which follow no list."""
    path = write("llama4", lambda tensors: tensors.update({"rope_freqs.weight": np.arange(1.0, 9.0)}))
    with pytest.raises(UnsupportedModelError, match="scaled by factors that follow no rule"):
        open_checkpoint(path)


def test_windows_stand_in_a_list_or_follow_from_a_number(nothing: Callable[..., Any]) -> None:
    listed = nothing("olmo3").layer_types
    every_fourth = (["sliding_attention"] * 3 + ["full_attention"]) * 2
    assert listed != every_fourth
    for pattern in (None, 4):
        assert nothing("olmo3", **{"attention.sliding_window_pattern": pattern}).layer_types == every_fourth
    with pytest.raises(CheckpointError, match=r"sliding_window_pattern is \(True, False\)"):
        nothing("olmo3", **{"attention.sliding_window_pattern": [True, False]})


def test_an_exaone_of_32b_has_a_window_even_where_its_file_names_none(nothing: Callable[..., Any]) -> None:
    assert nothing("exaone4").sliding_window is None
    assert nothing("exaone4", block_count=64).sliding_window == 4096
