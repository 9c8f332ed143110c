"""Packed weights are refused where there are none, and are advised where memory is short."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from gguf import GGMLQuantizationType as Type

from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.span import Span
from peerd.spans import budget
from peerd.spans.budget import how_many_blocks, kv_tokens_of, quantization_of
from peerd.spans.loading import load
from peerd.spans.spec import ServeSpec
from tests.compute.gguf_models import tiny_config, tiny_model
from tests.compute.gguf_writer import write_model


@pytest.fixture
def quantized(tmp_path: Path) -> Iterator[Checkpoint]:
    path = tmp_path / "tiny.gguf"
    write_model(path, "llama", tiny_model(tiny_config("llama")), Type.Q4_1)
    with open_checkpoint(path) as checkpoint:
        yield checkpoint


def test_a_gpu_does_not_compute_packed_weights(quantized: Checkpoint) -> None:
    with pytest.raises(InvalidRequest, match=r"on the CPU only: on cuda:0 serve with --quantize int8 or nf4"):
        quantization_of(ServeSpec(device="cuda:0", quantize="packed"), quantized)


def test_a_checkpoint_of_plain_weights_has_nothing_to_keep_packed(tmp_path: Path) -> None:
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path / "plain")
    with (
        open_checkpoint(tmp_path / "plain") as checkpoint,
        pytest.raises(InvalidRequest, match=r"is not stored as integers in groups.*--quantize none or int8"),
    ):
        quantization_of(ServeSpec(quantize="packed"), checkpoint)


@pytest.mark.parametrize(
    ("more", "faster", "chosen"),
    [
        ({}, True, "packed"),
        ({}, False, "none"),
        ({"quantize": "none"}, True, "none"),
        ({"quantize": "packed"}, False, "packed"),
        ({"dtype": "float32"}, True, "none"),
        ({"device": "cuda:0"}, True, "none"),
    ],
)
def test_a_quantized_file_stays_packed_unless_the_operator_or_the_cpu_speaks_against_it(
    quantized: Checkpoint, more: dict[str, Any], faster: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "packed_is_faster", lambda: faster)
    assert quantization_of(ServeSpec(**more), quantized) == chosen


def test_plain_weights_stay_plain_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "packed_is_faster", lambda: True)
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path / "plain")
    with open_checkpoint(tmp_path / "plain") as checkpoint:
        assert quantization_of(ServeSpec(), checkpoint) == "none"


@pytest.mark.parametrize(("quantize", "advised"), [("none", True), ("packed", False)])
def test_where_memory_is_short_packing_is_advised(quantized: Checkpoint, quantize: str, advised: bool) -> None:
    spec = ServeSpec(quantize=quantize, memory_bytes=1 << 20)
    for ask in (lambda: how_many_blocks(spec, quantized), lambda: kv_tokens_of(spec, quantized, Span(0, 1))):
        with pytest.raises(InvalidRequest) as refused:
            ask()
        assert ("--quantize packed" in str(refused.value)) is advised


def test_a_server_says_what_it_keeps_packed(
    quantized: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))
    caplog.set_level(logging.INFO)
    loaded = load(ServeSpec(quantize="packed", kv_tokens=64, throughput=100.0), quantized, Span(1, 3))
    assert loaded.quantization == "packed"
    assert "weights packed as published" in caplog.text
    assert "blocks 1:3 of tiny: not stored as integers in groups, so kept plain: mlp.down_proj.weight" in caplog.text
