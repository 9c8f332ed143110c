"""GGUF files are read block by block into what Transformers makes of the whole file, and are not trusted."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.compute.checkpoint.gguf.architectures import ARCHITECTURES, architecture_of
from peerd.compute.checkpoint.gguf.file import GgufFile
from peerd.compute.checkpoint.gguf.header import LongArray
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import CheckpointError, UnsupportedModelError
from peerd.compute.model.head import load_head
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span
from tests.compute.gguf_models import tiny_config, tiny_model
from tests.compute.gguf_writer import metadata_of, stored_tensors, write_gguf, write_model


def small_file(*, tensors: int | None = None, fields: int | None = None, extra: bytes = b"") -> bytes:
    """A well-formed file with one tensor of 8 values, unless counts are given."""
    key = b"general.architecture"
    field = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, 5) + b"llama"
    entry = struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)
    header = b"GGUF" + struct.pack("<IQQ", 3, 1 if tensors is None else tensors, 1 if fields is None else fields)
    body = header + field + extra + entry
    return body + bytes(-len(body) % 32) + np.arange(8, dtype=np.float32).tobytes()


def field(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], GgufFile]:
    def open_bytes(data: bytes) -> GgufFile:
        path = tmp_path / "hostile.gguf"
        path.write_bytes(data)
        return GgufFile(path)

    return open_bytes


def test_opening_block_7_reads_block_7s_bytes_only(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_model(path, "llama", tiny_model(tiny_config("llama")))
    with open_checkpoint(path) as checkpoint:
        before = checkpoint.bytes_read
        span = load_span(checkpoint, Span(7, 8))
        assert checkpoint.bytes_read - before == sum(tensor.nbytes for tensor in span.layers[0].state_dict().values())


def test_a_missing_half_of_the_experts_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    model = tiny_model(tiny_config("qwen3_moe"))
    tensors = dict(stored_tensors("qwen3moe", model))
    del tensors["blk.3.ffn_gate_exps.weight"]
    write_gguf(path, "qwen3moe", metadata_of("qwen3moe", model.config), tensors)
    with open_checkpoint(path) as checkpoint:
        load_span(checkpoint, Span(0, 3))
        with pytest.raises(CheckpointError, match=r"tiny\.gguf: tensor blk\.3\.ffn_gate_exps\.weight is missing"):
            load_span(checkpoint, Span(3, 4))


@pytest.mark.parametrize(("blocks", "scalar"), [(26, 16), (46, 8)])
def test_a_gemma_of_27b_scales_its_queries_by_another_width(tmp_path: Path, blocks: int, scalar: int) -> None:
    sizes = {"block_count": blocks, "embedding_length": 32, "attention.head_count": 4, "attention.key_length": 16}
    write_gguf(tmp_path / "gemma.gguf", "gemma2", sizes, {"token_embd.weight": np.zeros((4, 32))})
    with open_checkpoint(tmp_path / "gemma.gguf") as checkpoint:
        assert checkpoint.config.query_pre_attn_scalar == scalar


@pytest.mark.parametrize("stored", ["blk.2.attn_q_norm.weight", "blk.0.ffn_gate.0.weight", "blk.9.attn_q.weight"])
def test_a_tensor_that_the_model_has_no_place_for_is_refused_by_name(tmp_path: Path, stored: str) -> None:
    model = tiny_model(tiny_config("llama"))
    tensors = {**dict(stored_tensors("llama", model)), stored: np.ones((32, 32))}
    write_gguf(tmp_path / "tiny.gguf", "llama", metadata_of("llama", model.config), tensors)
    with pytest.raises(UnsupportedModelError, match=rf"tensor {re.escape(stored)} has no place in a llama"):
        open_checkpoint(tmp_path / "tiny.gguf")


def test_frequencies_that_every_block_repeats_are_passed_over(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("llama"))
    tensors = {**dict(stored_tensors("llama", model)), "blk.0.attn_rot_embd.weight": np.ones(8)}
    write_gguf(tmp_path / "tiny.gguf", "llama", metadata_of("llama", model.config), tensors)
    open_checkpoint(tmp_path / "tiny.gguf").close()


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("mamba", "mamba cannot be served: some of its blocks keep a state"),
        ("t5encoder", "t5encoder cannot be served: it is an encoder"),
        ("gemma4", "gemma4 cannot be served: its blocks share KV caches"),
        ("clip", "'clip' is not one of those supported: bloom"),
    ],
)
def test_an_architecture_that_cannot_be_served_is_refused_by_name(
    tmp_path: Path, architecture: str, reason: str
) -> None:
    write_gguf(tmp_path / "other.gguf", architecture, {}, {"token_embd.weight": np.ones((4, 4))})
    with pytest.raises(UnsupportedModelError, match=reason):
        open_checkpoint(tmp_path / "other.gguf")


def test_every_architecture_that_transformers_knows_is_read_or_refused_with_a_reason() -> None:
    from transformers.integrations import GGUF_CONFIG_MAPPING  # type: ignore[attr-defined]
    from transformers.integrations.gguf import GGUF_ARCHS  # type: ignore[attr-defined]

    # These are no architectures: general fields, and a llama by another name.
    for name in {*GGUF_CONFIG_MAPPING, *GGUF_ARCHS} - {"general", "tokenizer", "mistral"}:
        written = {"gpt_oss": "gpt-oss", "minimax_m2": "minimax-m2"}.get(name, name.replace("_moe", "moe"))
        if written not in ARCHITECTURES:
            with pytest.raises(UnsupportedModelError, match=f"{written} cannot be served: "):
                architecture_of({"general.architecture": written}, "here")


def test_a_model_that_attends_to_later_positions_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "tiny.gguf", "qwen2", tiny_model(tiny_config("qwen2")), **{"attention.causal": False})
    with pytest.raises(UnsupportedModelError, match="attend to later positions"):
        open_checkpoint(tmp_path / "tiny.gguf")


def test_a_file_without_the_models_sizes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(small_file())
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=r"tensor layers\.0\..* is missing"):
        load_span(checkpoint, Span(0, 1))


def test_the_embedding_says_how_large_the_vocabulary_is(tmp_path: Path) -> None:
    """Tokenizers may list fewer tokens than a padded embedding has rows."""
    model = tiny_model(tiny_config("qwen2"))
    write_model(tmp_path / "tiny.gguf", "qwen2", model, vocab_size=90)
    with open_checkpoint(tmp_path / "tiny.gguf") as checkpoint:
        assert load_head(checkpoint).vocab_size == 96


def test_a_well_formed_file_opens(opened: Callable[[bytes], GgufFile]) -> None:
    long = field(b"long", 9, struct.pack("<IQ", 5, 2000) + bytes(8000))
    few = field(b"few", 9, struct.pack("<IQ2B", 0, 2, 7, 8))
    file = opened(small_file(fields=3, extra=long + few))
    assert file.metadata == {"general.architecture": "llama", "long": LongArray(2000), "few": (7, 8)}
    tensor = file.tensors["t"]
    assert tensor.shape == (2, 4)
    assert file.read_rows(tensor, 1, 2).view(np.float32).tolist() == [[4, 5, 6, 7]]


def test_every_truncation_is_a_clear_error(opened: Callable[[bytes], GgufFile]) -> None:
    whole = small_file()
    for length in range(len(whole)):
        with pytest.raises(CheckpointError, match=r"hostile\.gguf: (truncated|claims)"):
            opened(whole[:length])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (small_file(tensors=2**63), "claims 9223372036854775808 tensors"),
        (small_file(fields=2**63), "claims 9223372036854775808 metadata fields"),
        (small_file(fields=2, extra=field(b"k", 8, struct.pack("<Q", 2**62))), "truncated: k"),
        (small_file(fields=2, extra=field(b"k", 9, struct.pack("<IQ", 0, 2**62))), "claims 4611686018427387904 values"),
        (small_file(fields=2, extra=field(b"k", 9, struct.pack("<IQ", 8, 2**40))), "claims 1099511627776 values"),
        (
            small_file(fields=2, extra=field(b"k", 9, struct.pack("<IQ", 8, 1025) + b"\xff" * 8 * 1025)),
            "truncated: metadata field k",
        ),
        (small_file(fields=2, extra=field(b"k", 9, struct.pack("<IQ", 9, 1))), "array of the unknown type 9"),
        (small_file(fields=2, extra=field(b"k", 99, b"")), "unknown type 99"),
        (small_file(fields=2, extra=field(b"\xff", 0, b"\0")), "not UTF-8"),
        (small_file(fields=3, extra=field(b"k", 0, b"\0") * 2), "occurs twice"),
        (small_file(fields=2, extra=field(b"general.alignment", 4, struct.pack("<I", 0))), "alignment is 0"),
        (small_file().replace(b"GGUF", b"FUGG"), "is not a GGUF file"),
        (small_file().replace(b"GGUF\x03", b"GGUF\x09"), "version 9"),
        (small_file().replace(struct.pack("<IQQI", 2, 4, 2, 0), struct.pack("<IQQI", 2, 4, 2, 77)), "unknown type 77"),
        (small_file().replace(struct.pack("<IQQI", 2, 4, 2, 0), struct.pack("<IQQI", 9, 4, 2, 0)), "has 9 dimensions"),
        (small_file().replace(struct.pack("<IQQ", 2, 4, 2), struct.pack("<IQQ", 2, 0, 2)), "cannot be F32"),
        (small_file().replace(struct.pack("<IQQI", 2, 4, 2, 0), struct.pack("<IQQI", 2, 4, 2, 8)), "cannot be Q8_0"),
        (small_file().replace(struct.pack("<QQ", 4, 2), struct.pack("<QQ", 2**60, 2**60)), "tensor t ends"),
    ],
)
def test_a_hostile_header_is_refused(opened: Callable[[bytes], GgufFile], data: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        opened(data)


@settings(max_examples=200, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_damaged_file_never_breaks_the_reader(tmp_path_factory: Any, changes: list[tuple[int, int]]) -> None:
    data = bytearray(small_file(fields=2, extra=field(b"k", 9, struct.pack("<IQ2B", 0, 2, 7, 8))))
    for position, value in changes:
        data[position % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(data)
    try:
        file = GgufFile(path)
        for tensor in file.tensors.values():
            file.read_rows(tensor, 0, 1)
        file.close()
    except CheckpointError:
        pass


@pytest.mark.model
def test_the_real_model_equals_transformers_reading_of_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its first three blocks and its ends: Transformers would spend seconds on the other 27."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    whole_reader: Any = gguf.GGUFReader

    def begun(path: Path) -> Any:
        reader = whole_reader(path)
        reader.tensors = [each for each in reader.tensors if re.match(r"(?!blk\.)|blk\.[012]\.", each.name)]
        return reader

    path = demo_model_path()
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3))
    # Transformers asks every submodule for its names too, which takes seconds and adds none.
    names: Any = SimpleNamespace(config=empty.config, state_dict=empty.state_dict, named_children=list)
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", begun)
        read = load_gguf_checkpoint(path, return_tensors=True, model_to_load=names)
    with torch.device("meta"):
        whole: Any = LlamaForCausalLM(LlamaConfig(**read["config"] | {"num_hidden_layers": 3})).eval()
    whole.load_state_dict(read["tensors"], strict=False, assign=True)
    whole.tie_weights()
    whole.model.rotary_emb = type(whole.model.rotary_emb)(whole.config)
    ids = torch.tensor([504, 3575, 282, 4649, 314, 260])
    with torch.no_grad(), open_checkpoint(path) as checkpoint:
        assert checkpoint.block_count == 30
        for name, tensor in checkpoint.read(checkpoint.names_of_block(2)):
            assert torch.equal(tensor, whole.model.get_parameter(name)), name
        head = load_head(checkpoint)
        hidden = head.embed(ids)[None]
        for span in (Span(0, 1), Span(1, 3)):
            hidden = load_span(checkpoint, span).forward_no_cache(hidden)
        torch.testing.assert_close(head.logits(hidden[0]), whole(ids[None]).logits[0], atol=1e-4, rtol=1e-4)
