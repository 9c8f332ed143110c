"""GGUF files are read block by block into what Transformers makes of the whole file, and are not trusted."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.compute.checkpoint import open_checkpoint
from peerd.compute.demo_model import demo_model_path
from peerd.compute.errors import CheckpointError, UnsupportedModel
from peerd.compute.gguf_file import GgufFile, LongArray
from peerd.compute.head import load_head
from peerd.compute.span_model import load_span
from peerd.protocol.span import Span

TinyCheckpoint = Callable[[str], Path]

#: GGUF's architecture -> the tiny model that is written as it.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2_full",
    "qwen3": "qwen3_full",
    "qwen3moe": "qwen3_moe_full",
    "gemma2": "gemma2_default",
    "gemma3": "gemma3_default",
    "phi3": "phi3",
    "bloom": "bloom",
}


def write_gguf(path: Path, model: Any, architecture: str, **more: int | float | str) -> None:
    """Write a Transformers model as llama.cpp's converter does, in F32."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**metadata_of(model.config), **more}.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        full_key = key if key.startswith(("split", "tokenizer")) else f"{architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(full_key, value)
        else:
            add(full_key, value)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        for stored, values in stored_tensors(name, tensor.numpy(), names, architecture, model.config):
            writer.add_tensor(stored, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def metadata_of(config: Any) -> dict[str, int | float | str]:
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    fields = {
        "block_count": config.num_hidden_layers,
        "context_length": getattr(config, "max_position_embeddings", None),
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None),
        "attention.key_length": getattr(config, "head_dim", None),
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": getattr(config, "layer_norm_epsilon", None),
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.dimension_count": getattr(config, "head_dim", None),
        "expert_count": getattr(config, "num_experts", None),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        "vocab_size": config.vocab_size,
        "tokenizer.ggml.padding_token_id": config.pad_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
    }
    return {key: value for key, value in fields.items() if value is not None}


def stored_tensors(
    name: str, values: Any, names: Any, architecture: str, config: Any
) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """What the converter stores for one parameter: other names, llama's permutation, gemma's shift, bloom's order."""
    block = name.split(".")[2] if ".layers." in name else ""
    if name.endswith("experts.gate_up_proj"):
        gate, up = np.split(values, 2, axis=1)
        return [(f"blk.{block}.ffn_gate_exps.weight", gate), (f"blk.{block}.ffn_up_exps.weight", up)]
    if name.endswith("experts.down_proj"):
        return [(f"blk.{block}.ffn_down_exps.weight", values)]
    stem, suffix = name.rsplit(".", 1)
    stored = f"{names.get_name(stem) or names.get_name(stem.removeprefix('transformer.'))}.{suffix}"
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        values = values + 1
    if architecture == "bloom" and "query_key_value" in name:
        values = values.reshape(config.n_head, 3, -1, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)
    return [(stored, values)]


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


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_model_written_as_gguf_comes_back_with_the_same_logits(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, architecture: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(ARCHITECTURES[architecture])).eval()
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, architecture)
    ids = torch.randint(3, 128, (30,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
        with open_checkpoint(path) as checkpoint:
            head, span = load_head(checkpoint), load_span(checkpoint, Span(0, 8))
        logits = head.logits(span.forward_no_cache(head.embed(ids)[None])[0])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_opening_block_7_reads_block_7s_bytes_only(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = tmp_path / "tiny.gguf"
    write_gguf(path, AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")), "llama")
    with open_checkpoint(path) as checkpoint:
        before = checkpoint.bytes_read
        span = load_span(checkpoint, Span(7, 8))
        assert checkpoint.bytes_read - before == sum(tensor.nbytes for tensor in span.layers[0].state_dict().values())


def test_a_missing_half_of_the_experts_is_named(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = tmp_path / "tiny.gguf"
    write_gguf(path, AutoModelForCausalLM.from_pretrained(tiny_checkpoint("qwen3_moe_full")), "qwen3moe")
    path.write_bytes(path.read_bytes().replace(b"blk.3.ffn_gate_exps", b"blk.3.ffn_gone_exps"))
    with open_checkpoint(path) as checkpoint:
        load_span(checkpoint, Span(0, 3))
        with pytest.raises(CheckpointError, match=r"tiny\.gguf: tensor blk\.3\.ffn_gate_exps\.weight is missing"):
            load_span(checkpoint, Span(3, 4))


@pytest.mark.parametrize(("blocks", "scalar"), [(26, 16), (46, 8)])
def test_a_gemma_of_27b_scales_its_queries_by_another_width(tmp_path: Path, blocks: int, scalar: int) -> None:
    writer = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma2")
    sizes = {"block_count": blocks, "embedding_length": 32, "attention.head_count": 4, "attention.key_length": 16}
    for key, value in sizes.items():
        writer.add_uint32(f"gemma2.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(tmp_path / "gemma.gguf") as checkpoint:
        assert checkpoint.config.query_pre_attn_scalar == scalar


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"rope.scaling.type": "yarn"}, "scaled .yarn."),
        ({"expert_count": 8}, "llama with experts"),
        ({"split.count": 3}, "one of 3 parts"),
    ],
)
def test_what_transformers_would_read_wrong_is_refused(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, more: dict[str, Any], reason: str
) -> None:
    from transformers import AutoModelForCausalLM

    path = tmp_path / "tiny.gguf"
    write_gguf(path, AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")), "llama", **more)
    with pytest.raises(UnsupportedModel, match=reason):
        open_checkpoint(path)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "mamba.gguf"
    path.write_bytes(small_file().replace(b"llama", b"mamba"))
    with pytest.raises(UnsupportedModel, match="'mamba' is not one of those supported: bloom"):
        open_checkpoint(path)


def test_a_file_without_the_models_sizes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(small_file())
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=r"tensor layers\.0\..* is missing"):
        load_span(checkpoint, Span(0, 1))


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
        (small_file(fields=3, extra=field(b"k", 0, b"\0") * 2), "is there twice"),
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
def test_the_real_model_equals_transformers_reading_of_the_whole_file() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = demo_model_path()
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(num_hidden_layers=30))
    # Transformers asks every submodule for its names too, which takes seconds and adds none.
    names: Any = SimpleNamespace(config=empty.config, state_dict=empty.state_dict, named_children=list)
    read = load_gguf_checkpoint(path, return_tensors=True, model_to_load=names)
    with torch.device("meta"):
        whole: Any = LlamaForCausalLM(LlamaConfig(**read["config"])).eval()
    whole.load_state_dict(read["tensors"], strict=False, assign=True)
    whole.tie_weights()
    whole.model.rotary_emb = type(whole.model.rotary_emb)(whole.config)
    ids = torch.tensor([504, 3575, 282, 4649, 314, 260])
    with torch.no_grad(), open_checkpoint(path) as checkpoint:
        assert checkpoint.block_count == 30
        for name, tensor in checkpoint.read(checkpoint.names_of_block(17)):
            assert torch.equal(tensor, whole.model.get_parameter(name)), name
        head = load_head(checkpoint)
        hidden = head.embed(ids)[None]
        for span in (Span(0, 15), Span(15, 30)):
            hidden = load_span(checkpoint, span).forward_no_cache(hidden)
        torch.testing.assert_close(head.logits(hidden[0]), whole(ids[None]).logits[0], atol=1e-4, rtol=1e-4)
