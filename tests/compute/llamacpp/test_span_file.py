"""A span's file holds its blocks' bytes as they were, numbered from 0, and nothing of the other blocks."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from peerd.compute.checkpoint.gguf.split import GgufFiles
from peerd.compute.llamacpp.span_file import write_span
from peerd.protocol.span import Span
from tests.compute.gguf_models import tiny_config, tiny_model
from tests.compute.gguf_writer import metadata_of, stored_tensors, write_gguf

Q8 = gguf.GGMLQuantizationType.Q8_0


def bytes_of(file: GgufFiles, name: str) -> bytes:
    tensor = file.tensors[name]
    return file.read_rows(tensor, 0, tensor.n_bytes // tensor.row_bytes).tobytes()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path, model = tmp_path / "whole.gguf", tiny_model(tiny_config("llama"))
    tensors = {**dict(stored_tensors("llama", model)), "rope_freqs.weight": [1.0] * 8}
    metadata = {**metadata_of("llama", model.config), "tokenizer.ggml.tokens": ["a", "b"], "general.name": "tiny"}
    write_gguf(path, "llama", metadata, tensors, Q8)
    return path


def test_a_span_is_copied_byte_for_byte_and_numbered_from_0(source: Path, tmp_path: Path):
    whole = GgufFiles(source)
    write_span(whole, Span(3, 5), tmp_path / "span.gguf")
    part = GgufFiles(tmp_path / "span.gguf")
    for name in whole.tensors:
        if name.startswith(("blk.3.", "blk.4.")):
            own = name.replace("blk.3.", "blk.0.").replace("blk.4.", "blk.1.")
            assert part.tensors[own].kind == whole.tensors[name].kind
            assert part.tensors[own].shape == whole.tensors[name].shape
            assert bytes_of(part, own) == bytes_of(whole, name)
    assert bytes_of(part, "rope_freqs.weight") == bytes_of(whole, "rope_freqs.weight")
    others = {name for name in part.tensors if not name.startswith("blk.")}
    assert others == {"token_embd.weight", "output.weight", "output_norm.weight", "rope_freqs.weight"}
    assert part.tensors["token_embd.weight"].shape == (1, 32)


def test_metadata_are_copied_as_stored_but_for_what_a_span_has_of_its_own(source: Path, tmp_path: Path):
    whole = GgufFiles(source)
    write_span(whole, Span(3, 5), tmp_path / "span.gguf")
    part = GgufFiles(tmp_path / "span.gguf")
    assert part.metadata["llama.block_count"] == 2
    assert part.metadata["llama.vocab_size"] == 1
    assert part.metadata["tokenizer.ggml.model"] == "none"
    own = {"llama.block_count", "llama.vocab_size", "tokenizer.ggml.model"}
    assert {key for key in part.metadata if key not in own} == {
        "general.architecture",
        *(key for key in whole.metadata if key.startswith("llama.") and key not in own),
    }
    for key in part.metadata.keys() - own:
        assert part.stored_fields[key] == whole.stored_fields[key]
