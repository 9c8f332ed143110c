"""A span that llama.cpp computes wrongly is not served; what it cannot compute at all, it is not given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import CheckpointError, UnsupportedModelError
from peerd.compute.llamacpp.loading import load_llama_engine
from peerd.compute.llamacpp.span_model import LlamaSpan
from peerd.compute.llamacpp.supported import why_not
from peerd.protocol.span import Span
from tests.compute.gguf_models import tiny_config, tiny_model
from tests.compute.gguf_writer import metadata_of, stored_tensors, write_gguf
from tests.compute.llamacpp.conftest import TinyFile, needs_llamacpp


def reason(path: Path) -> str:
    with open_checkpoint(path) as checkpoint:
        return why_not(checkpoint)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama", ""),
        ("qwen3_moe", ""),
        ("gemma2", "is a gemma2"),
        ("gpt2", "is a gpt2"),
        ("smollm3", "is a smollm3"),
        ("qwen2_yarn", "has rotary embeddings of the kind yarn"),
    ],
)
def test_only_models_whose_blocks_can_be_cut_out_are_given_to_llama_cpp(name: str, said: str, tiny_file: TinyFile):
    assert reason(tiny_file(name)).startswith(said)
    assert bool(reason(tiny_file(name))) == bool(said)


def test_a_directory_of_safetensors_is_not_given_to_llama_cpp(tmp_path: Path):
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path)
    assert reason(tmp_path) == "is not a GGUF file"


def test_blocks_that_differ_by_their_numbers_are_not_given_to_llama_cpp(tmp_path: Path):
    model = tiny_model(tiny_config("llama"))
    metadata = {**metadata_of("llama", model.config), "own_field": [1] * 8}
    write_gguf(tmp_path / "model.gguf", "llama", metadata, dict(stored_tensors("llama", model)))
    assert reason(tmp_path / "model.gguf") == "has blocks that differ in llama.own_field"


def test_a_norm_that_llama_cpp_would_die_of_is_not_given_to_it(tmp_path: Path):
    model = tiny_model(tiny_config("llama"))
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", metadata_of("llama", model.config), dict(stored_tensors("llama", model)))
    with open_checkpoint(path) as checkpoint:
        weights: Any = checkpoint.weights
        tensors = dict(weights.file.tensors)
        norm = tensors["blk.3.attn_norm.weight"]
        object.__setattr__(norm, "kind", gguf.GGMLQuantizationType.F16)
        assert why_not(checkpoint) == "stores blk.3.attn_norm.weight as F16, which llama.cpp takes in F32 only"


@needs_llamacpp
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_block_that_computes_something_else_is_refused_in_one_line(
    name: str, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
):
    real = LlamaSpan.trace

    def shifted(self: LlamaSpan, hidden: np.ndarray, sequence: int) -> list[np.ndarray]:
        """As if the last block had been given positions in another order."""
        outputs = real(self, hidden, sequence)
        return [*outputs[:-1], outputs[-1][::-1].copy()]

    monkeypatch.setattr(LlamaSpan, "trace", shifted)
    with (
        open_checkpoint(tiny_file(name)) as checkpoint,
        pytest.raises(UnsupportedModelError, match=r"served with llama.cpp \(xllamacpp .*\): block 3 differs"),
    ):
        load_llama_engine(checkpoint, Span(1, 4), kv_tokens=64)


@needs_llamacpp
def test_a_cache_that_is_not_read_is_noticed(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch):
    real: Callable[..., np.ndarray] = LlamaSpan.run

    def forgetful(self: LlamaSpan, hidden, positions, sequences, blocks=None):
        for sequence in set(sequences):
            self.cut(sequence)
        return real(self, hidden, positions, sequences, blocks)

    monkeypatch.setattr(LlamaSpan, "run", forgetful)
    with (
        open_checkpoint(tiny_file()) as checkpoint,
        pytest.raises(UnsupportedModelError, match="blocks 1:4 in pieces differs"),
    ):
        load_llama_engine(checkpoint, Span(1, 4), kv_tokens=64)


@needs_llamacpp
def test_a_file_that_llama_cpp_does_not_load_is_refused_with_what_it_says(tmp_path: Path):
    model = tiny_model(tiny_config("llama"))
    tensors = dict(stored_tensors("llama", model))
    tensors["blk.2.attn_q.weight"] = np.zeros((48, 32))
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", metadata_of("llama", model.config), tensors)
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(CheckpointError, match=r"llama.cpp does not load blocks 1:4: .*blk.1.attn_q.weight"),
    ):
        load_llama_engine(checkpoint, Span(1, 4), kv_tokens=64)
