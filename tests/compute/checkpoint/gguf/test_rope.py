"""Scaled rotary embeddings are read from GGUF exactly, or refused with the reason."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import CheckpointError, UnsupportedModelError
from peerd.compute.model.head import load_head
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span
from tests.compute.gguf_models import tiny_config, tiny_model
from tests.compute.gguf_writer import metadata_of, stored_tensors, write_gguf, write_model

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PHI = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2, 3, 5, 8]}


def scaled(name: str, rope: dict[str, Any], **more: Any) -> Any:
    config = tiny_config(name)
    return tiny_model(type(config)(**{**config.to_dict(), "rope_parameters": rope, **more}))


def logits_of(path: Path, ids: torch.Tensor, max_length: int | None = None) -> torch.Tensor:
    with open_checkpoint(path) as checkpoint:
        head, span = load_head(checkpoint), load_span(checkpoint, Span(0, 8))
    with torch.no_grad():
        return head.logits(span.forward_no_cache(head.embed(ids)[None], max_length)[0])


def expect_same(path: Path, model: Any, length: int = 60) -> None:
    ids = torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    torch.testing.assert_close(logits_of(path, ids, length), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("stated", "kind"),
    [
        ({**LLAMA3, "original_max_position_embeddings": 8192}, "llama3"),
        ({**LLAMA3, "original_max_position_embeddings": 8192, "factor": 32.0}, "llama3"),
        ({**LLAMA3, "original_max_position_embeddings": 32, "rope_theta": 500.0}, "longrope"),
    ],
)
def test_llama_3s_frequencies_are_read_whether_its_rule_is_a_published_one_or_not(
    tmp_path: Path, stated: dict[str, Any], kind: str
) -> None:
    model = scaled("llama", stated, max_position_embeddings=131072)
    write_model(tmp_path / "tiny.gguf", "llama", model)
    with open_checkpoint(tmp_path / "tiny.gguf") as checkpoint:
        assert checkpoint.config.rope_parameters["rope_type"] == kind
    expect_same(tmp_path / "tiny.gguf", model)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_linear_scaling_is_read(tmp_path: Path, name: str) -> None:
    model = scaled(name, {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0})
    write_model(tmp_path / "tiny.gguf", name, model)
    expect_same(tmp_path / "tiny.gguf", model)


def test_linear_scaling_under_its_old_name_is_read(tmp_path: Path) -> None:
    model = scaled("llama", {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0})
    metadata = metadata_of("llama", model.config)
    metadata = {key: value for key, value in metadata.items() if "scaling" not in key} | {"rope.scale_linear": 3.0}
    write_gguf(tmp_path / "tiny.gguf", "llama", metadata, dict(stored_tensors("llama", model)))
    expect_same(tmp_path / "tiny.gguf", model)


@pytest.mark.parametrize("length", [20, 60])
def test_lists_for_short_and_long_texts_are_read(tmp_path: Path, length: int) -> None:
    lengths = {"max_position_embeddings": 128, "original_max_position_embeddings": 32}
    model = scaled("phi3", dict(PHI), **lengths)
    write_model(tmp_path / "tiny.gguf", "phi3", model)
    expect_same(tmp_path / "tiny.gguf", model, length)


def test_a_part_of_each_head_may_turn(tmp_path: Path) -> None:
    model = scaled("phi3", {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5})
    write_model(tmp_path / "tiny.gguf", "phi3", model)
    expect_same(tmp_path / "tiny.gguf", model)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "original_context_length is None"),
        ({"rope.scaling.type": "linear"}, "factor is None"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": math.inf}, "factor is inf"),
        ({"rope.scaling.type": "longrope"}, r"scaled \(longrope\), which GGUF states incompletely"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_log_multiplier": 0.1}, "with yarn_log_multiplier"),
    ],
)
def test_what_is_stated_by_halves_is_refused(tmp_path: Path, more: dict[str, Any], reason: str) -> None:
    write_model(tmp_path / "tiny.gguf", "llama", tiny_model(tiny_config("llama")), **more)
    with pytest.raises(UnsupportedModelError, match=reason):
        open_checkpoint(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("values", [[1.0, 0.0], [1.0, math.nan], [-1.0, 1.0]])
def test_factors_that_cannot_divide_are_refused(tmp_path: Path, values: list[float]) -> None:
    model = tiny_model(tiny_config("llama"))
    tensors = {**dict(stored_tensors("llama", model)), "rope_freqs.weight": np.array(values)}
    write_gguf(tmp_path / "tiny.gguf", "llama", metadata_of("llama", model.config), tensors)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight has values that are no factors"):
        open_checkpoint(tmp_path / "tiny.gguf")


def test_a_list_of_factors_of_another_length_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("llama"))
    tensors = {**dict(stored_tensors("llama", model)), "rope_freqs.weight": np.array([1.0, 2.0, 3.0])}
    write_gguf(tmp_path / "tiny.gguf", "llama", metadata_of("llama", model.config), tensors)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight has 3 values, a head's half is 8"):
        open_checkpoint(tmp_path / "tiny.gguf")
