"""llama.cpp computes where it is asked for, and where torch would dequantize; torch computes everywhere else."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import AdapterError, UnusablePackageError
from peerd.compute.llamacpp import library
from peerd.compute.llamacpp.engine import LlamaEngine
from peerd.compute.llamacpp.library import is_installed, is_usable
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.span import Span
from peerd.spans import budget
from peerd.spans.adapters import load_adapter
from peerd.spans.budget import dtype_of, engine_of, how_many_blocks, kv_tokens_of, memory_budget
from peerd.spans.loading import expected_record, load
from peerd.spans.spec import LLAMACPP, TORCH, ServeSpec
from tests.compute.gguf_models import tiny_config, tiny_model
from tests.compute.gguf_writer import write_model

needs_llamacpp = pytest.mark.skipif(not is_installed(), reason="xllamacpp is not installed")
MIB = 1 << 20


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    path = tmp_path / "tiny.gguf"
    write_model(path, "llama", tiny_model(tiny_config("llama")), Type.Q8_0)
    with open_checkpoint(path) as opened:
        yield opened


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measurements and findings of this test alone."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))
    is_usable.cache_clear()
    yield
    is_usable.cache_clear()


def break_llamacpp(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise UnusablePackageError("llama.cpp cannot be used: xllamacpp 9 does not work here: no such symbol")

    monkeypatch.setattr(library, "is_installed", lambda: True)
    for module in (library, budget):
        monkeypatch.setattr(module, "load_library", fail)


@pytest.mark.parametrize(
    ("wishes", "chosen"),
    [
        ({}, LLAMACPP),
        ({"engine": "torch"}, TORCH),
        ({"dtype": "float32"}, TORCH),
        ({"quantize": "none"}, TORCH),
        ({"quantize": "packed"}, TORCH),
        ({"adapters": (("one", "folder"),)}, TORCH),
        ({"client_adapter_bytes": 10**6}, TORCH),
        ({"client_adapter_bytes": 0}, LLAMACPP),
        ({"device": "cuda:0"}, TORCH),
    ],
    ids=str,
)
def test_auto_takes_llama_cpp_where_torch_would_dequantize_and_nothing_is_wanted_that_it_lacks(
    wishes: dict[str, Any], chosen: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(budget, "is_usable", lambda: True)
    monkeypatch.setattr(budget, "packed_is_faster", lambda: False)
    assert engine_of(ServeSpec(**wishes), checkpoint) == chosen


def test_auto_takes_torch_where_it_computes_packed_weights_well(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(budget, "is_usable", lambda: True)
    monkeypatch.setattr(budget, "packed_is_faster", lambda: True)
    assert engine_of(ServeSpec(), checkpoint) == TORCH


def test_auto_takes_torch_for_a_file_of_plain_weights_which_it_computes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(budget, "is_usable", lambda: True)
    write_model(tmp_path / "plain.gguf", "llama", tiny_model(tiny_config("llama")), Type.F16)
    with open_checkpoint(tmp_path / "plain.gguf") as plain:
        assert engine_of(ServeSpec(), plain) == TORCH


def test_auto_takes_torch_for_what_is_no_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(budget, "is_usable", lambda: True)
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path / "plain")
    with open_checkpoint(tmp_path / "plain") as plain:
        assert engine_of(ServeSpec(), plain) == TORCH
        with pytest.raises(InvalidRequest, match=r"llama.cpp cannot serve plain: it is not a GGUF file"):
            engine_of(ServeSpec(engine=LLAMACPP), plain)


def test_a_wish_that_llama_cpp_lacks_is_refused_if_it_is_asked_for(checkpoint: Checkpoint):
    with pytest.raises(InvalidRequest, match="it has no --dtype and no --adapter; leave out --engine llamacpp"):
        engine_of(ServeSpec(engine=LLAMACPP, dtype="float32", adapters=(("one", "folder"),)), checkpoint)
    with pytest.raises(InvalidRequest, match="'vllm' is not one of auto, torch, llamacpp"):
        engine_of(ServeSpec(engine="vllm"), checkpoint)


def test_a_broken_package_costs_one_line_and_torch_serves(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    break_llamacpp(monkeypatch)
    monkeypatch.setattr(budget, "packed_is_faster", lambda: False)
    loaded = load(ServeSpec(kv_tokens=64, throughput=1.0), checkpoint, Span(1, 3))
    assert loaded.quantization != LLAMACPP
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [
        "llama.cpp cannot be used: xllamacpp 9 does not work here: no such symbol. Until then torch computes"
    ]
    with pytest.raises(UnusablePackageError, match="xllamacpp 9 does not work here"):
        load(ServeSpec(engine=LLAMACPP, kv_tokens=64), checkpoint, Span(1, 3))


def test_without_the_package_nothing_is_said(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(library, "is_installed", lambda: False)
    monkeypatch.setattr(budget, "packed_is_faster", lambda: False)
    assert engine_of(ServeSpec(), checkpoint) == TORCH
    assert not caplog.records


@needs_llamacpp
def test_a_span_is_announced_as_what_computes_it(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    spec = ServeSpec(kv_tokens=64, engine=LLAMACPP)
    assert expected_record(spec, checkpoint).quantization == LLAMACPP
    loaded = load(spec, checkpoint, Span(1, 3))
    assert isinstance(loaded.engine, LlamaEngine)
    assert (loaded.dtype, loaded.quantization) == ("float32", LLAMACPP)
    assert loaded.throughput > 0
    # A client's adapter finds no room, so that its sessions go to other servers.
    assert loaded.adapter_room.session_bytes == 0
    assert "blocks 1:3 of tiny: float32, weights as published, by llama.cpp, KV for 64 positions" in caplog.text
    adapter: Any = None
    with pytest.raises(AdapterError, match=r"llama.cpp computes blocks 1:3, and runs no adapters: use --engine torch"):
        load_adapter(loaded.engine, adapter)


@pytest.mark.parametrize(("asked", "dtype"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_a_gguf_file_is_computed_in_bfloat16_on_a_gpu_unless_asked(
    checkpoint: Checkpoint, asked: str | None, dtype: torch.dtype
):
    assert dtype_of(ServeSpec(device="cuda", dtype=asked), checkpoint) == dtype
    assert dtype_of(ServeSpec(dtype=asked), checkpoint) == torch.float32


@needs_llamacpp
def test_its_memory_is_that_of_the_file_and_of_kv_in_fp16(checkpoint: Checkpoint):
    spec = ServeSpec(engine=LLAMACPP)
    wanted = memory_budget(spec, checkpoint, Span(1, 3))
    weights: Any = checkpoint.weights
    stored = weights.file.tensors
    own = [tensor for name, tensor in stored.items() if name.startswith(("blk.1.", "blk.2."))]
    assert wanted.blocks == sum(tensor.n_bytes for tensor in own)
    # Two blocks, keys and values of two heads of 16, 2 bytes each.
    assert wanted.kv_per_token == 2 * 2 * 2 * 16 * 2
    assert memory_budget(spec, checkpoint, 2).blocks >= wanted.blocks
    assert how_many_blocks(spec, checkpoint) == checkpoint.block_count
    assert kv_tokens_of(ServeSpec(engine=LLAMACPP, memory_bytes=1 << 40), checkpoint, Span(0, 8)) == 16384
    with pytest.raises(InvalidRequest, match="serve fewer blocks, raise --memory or"):
        kv_tokens_of(ServeSpec(engine=LLAMACPP, memory_bytes=MIB, kv_tokens=64), checkpoint, Span(1, 3))
