"""Tiny GGUF files, and both engines over spans of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.engine import Engine
from peerd.compute.llamacpp.engine import LlamaEngine
from peerd.compute.llamacpp.library import is_installed
from peerd.compute.llamacpp.loading import load_llama_engine
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span
from tests.compute.gguf_models import TINY, tiny_config, tiny_model
from tests.compute.gguf_writer import write_model

#: For tests that need the package.
needs_llamacpp = pytest.mark.skipif(not is_installed(), reason="xllamacpp is not installed")

TinyFile = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> TinyFile:
    """Write a tiny model of random weights, in F32 or as `kind`; each once."""
    folder = tmp_path_factory.mktemp("gguf")

    def write(name: str = "llama", kind: gguf.GGMLQuantizationType | None = None) -> Path:
        path = folder / f"{name}-{kind.name if kind else 'F32'}.gguf"
        if not path.exists():
            write_model(path, TINY[name][0], tiny_model(tiny_config(name)), kind)
        return path

    return write


@pytest.fixture
def llama_engine(tiny_file: TinyFile) -> Callable[..., LlamaEngine]:
    def load(span: Span, path: Path | None = None, *, kv_tokens: int = 512, batch_tokens: int = 32) -> LlamaEngine:
        with open_checkpoint(path or tiny_file()) as checkpoint:
            return load_llama_engine(checkpoint, span, kv_tokens=kv_tokens, batch_tokens=batch_tokens)

    return load


@pytest.fixture
def torch_engine(tiny_file: TinyFile) -> Callable[..., Engine]:
    def load(span: Span, path: Path | None = None, *, kv_tokens: int = 512, batch_tokens: int = 32) -> Engine:
        with open_checkpoint(path or tiny_file()) as checkpoint:
            model = load_span(checkpoint, span, attention=register_attention())
        return Engine(model, kv_tokens=kv_tokens, batch_tokens=batch_tokens)

    return load
