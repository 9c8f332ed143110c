"""A span that computes something else than its model is refused before it is announced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from peerd.compute.attention import own_attention
from peerd.compute.attention.attention import BlockAttention, register_attention
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.engine import Engine
from peerd.compute.engine.self_test import check_span
from peerd.compute.errors import UnsupportedModelError
from peerd.compute.families.lookup import FAMILIES
from peerd.compute.model.span_model import SpanModel, load_span
from peerd.protocol.span import Span
from tests.compute.tiny_families import tiny_model

BLOCKS = Span(1, 7)


class LoadSpan(Protocol):
    def __call__(self, name: str, dtype: torch.dtype = torch.float32, quantize: str = "none") -> SpanModel: ...


@pytest.fixture
def load(tmp_path: Path) -> Iterator[LoadSpan]:
    """Load the middle of a family's tiny model."""
    with ExitStack() as stack:

        def load(name: str, dtype: torch.dtype = torch.float32, quantize: str = "none") -> SpanModel:
            tiny_model(FAMILIES[name]).save_pretrained(tmp_path / name)
            checkpoint = stack.enter_context(open_checkpoint(tmp_path / name))
            return load_span(checkpoint, BLOCKS, dtype=dtype, attention=register_attention(), quantize=quantize)

        yield load


def check(span: SpanModel, quantize: str = "none", **settings: Any) -> Engine:
    engine = Engine(span, **{"kv_tokens": 8192, "page_tokens": 4} | settings)
    check_span(engine, span, quantize)
    return engine


# Of its own attention in some releases and in all, with running states, windows, sinks, compressed keys, experts, and
# rows one by one.
EACH_KIND = (
    "bloom",
    "codegen",
    "deepseek_v3",
    "gemma2",
    "gpt_oss",
    "gptj",
    "jetmoe",
    "lfm2",
    "llama",
    "mixtral",
    "mpt",
    "qwen3_next",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EACH_KIND)
def test_a_sound_span_passes(name: str, dtype: torch.dtype, load: LoadSpan) -> None:
    check(load(name, dtype))


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_sound_span_passes_quantized(name: str, quantize: str, load: LoadSpan) -> None:
    check(load(name, torch.bfloat16, quantize), quantize)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_sound_span_passes_where_rows_are_attended_for_all_at_once(name: str, load: LoadSpan) -> None:
    check(load(name), paged=True)


def test_a_pool_of_a_single_page_is_enough(load: LoadSpan) -> None:
    check(load("llama"), kv_tokens=4)


def test_the_engine_is_left_as_it_was(load: LoadSpan) -> None:
    engine = check(load("gemma2"))
    assert engine.free_tokens == engine.total_tokens
    assert (engine.positions_computed, engine.batches_run) == (0, 0)
    assert not engine.ready()


def test_attention_that_drops_its_cache_is_refused(load: LoadSpan, monkeypatch: pytest.MonkeyPatch) -> None:
    """What MPT did under Transformers 5.24: the cache came under a new name, which its attention dropped."""
    monkeypatch.setattr(own_attention, "take_cache", lambda _: None)
    with pytest.raises(UnsupportedModelError) as refusal:
        check(load("mpt"))
    line = str(refusal.value)
    assert "\n" not in line
    assert line.startswith("mpt cannot be served with Transformers ")
    assert f"torch {torch.__version__}, float32 on cpu" in line
    assert line.endswith("block 1 does not write its KV cache")


def test_attention_that_sees_too_few_of_its_keys_is_refused(load: LoadSpan, monkeypatch: pytest.MonkeyPatch) -> None:
    blind_to_the_first_key(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=r"block 1 computes something else with its KV cache"):
        check(load("llama", torch.bfloat16))


def test_each_kind_of_block_is_tried(load: LoadSpan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2's odd blocks see everything, its even ones slide."""
    blind_to_the_first_key(monkeypatch, sliding_only=True)
    with pytest.raises(UnsupportedModelError, match=r"block 2 computes something else"):
        check(load("gemma2"))


def blind_to_the_first_key(monkeypatch: pytest.MonkeyPatch, *, sliding_only: bool = False) -> None:
    """Of what is cached attention sees no first key: in pieces it sees another text than whole."""
    original = BlockAttention._over_row

    def blind(self: Any, query: Any, keys: Any, values: Any, visible: Any, scores: Any) -> torch.Tensor:
        if keys.shape[2] > query.shape[2] and (self._kind.window or not sliding_only):
            keys = torch.cat([keys[:, :, 1:2], keys[:, :, 1:]], dim=2)
        return original(self, query, keys, values, visible, scores)

    monkeypatch.setattr(BlockAttention, "_over_row", blind)


def test_a_cache_under_a_name_that_a_release_does_not_know_is_refused(load: LoadSpan) -> None:
    span = load("llama")
    span._cache_argument = "kv_of_tomorrow"
    with pytest.raises(UnsupportedModelError, match=r"its blocks raise TypeError: .*kv_of_tomorrow"):
        check(span)


def test_numbers_that_half_precision_cannot_hold_are_refused_with_the_remedy(load: LoadSpan) -> None:
    span = load("llama", torch.float16)
    with torch.no_grad():
        span.layers[3].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(UnsupportedModelError, match=r"blocks 1:7 give NaN or infinity in float16: .*--dtype bfloat16"):
        check(span)


def test_weights_that_are_no_numbers_are_refused(load: LoadSpan) -> None:
    span = load("llama")
    with torch.no_grad():
        span.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(UnsupportedModelError, match=r"blocks 1:2 give NaN or infinity in float32: its weights"):
        check(span)


def test_too_little_memory_is_no_fault_of_the_model(load: LoadSpan, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Engine, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        check(load("llama"))
