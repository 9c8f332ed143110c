"""Tries whether llama.cpp computes right on this machine: one tiny block of random weights, compared with torch."""

from __future__ import annotations

import tempfile
from pathlib import Path

import gguf
import numpy as np

from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.llamacpp.loading import load_llama_engine
from peerd.protocol.span import Span

# The smallest Llama whose rows are whole groups of 32, so that its matrices can be quantized.
_WIDTH, _INNER, _HEADS, _KV_HEADS, _WORDS = 64, 96, 4, 2, 8
_KV_TOKENS = 64
_MATRICES = {
    "attn_q": (_WIDTH, _WIDTH),
    "attn_k": (_WIDTH * _KV_HEADS // _HEADS, _WIDTH),
    "attn_v": (_WIDTH * _KV_HEADS // _HEADS, _WIDTH),
    "attn_output": (_WIDTH, _WIDTH),
    "ffn_gate": (_INNER, _WIDTH),
    "ffn_up": (_INNER, _WIDTH),
    "ffn_down": (_WIDTH, _INNER),
}


def check_llamacpp() -> None:
    """Serve a tiny block in Q8_0 with llama.cpp, which compares it with torch before it is used.

    Raises UnusablePackageError if the package is missing or unknown, UnsupportedModelError if it computes something
    else than torch, CheckpointError, MemoryError, and OSError if the temporary file cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="peerd-") as folder:
        path = Path(folder) / "tiny.gguf"
        _write(path)
        with open_checkpoint(path) as checkpoint:
            load_llama_engine(checkpoint, Span(0, 1), kv_tokens=_KV_TOKENS, batch_tokens=_KV_TOKENS)


def _write(path: Path) -> None:
    random, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(_KV_TOKENS)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(_WORDS)
    writer.add_tensor("token_embd.weight", np.zeros((_WORDS, _WIDTH), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, np.float32))
    for name, shape in _MATRICES.items():
        values = random.normal(0, 0.2, shape).astype(np.float32)
        writer.add_tensor(f"blk.0.{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
