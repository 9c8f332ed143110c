"""Tests that need a GPU: run this first on a machine that has one. Without one everything here is skipped.

test_paged and test_paged_engine run on the GPU too if there is one, so that kernels and recorded decodes are compared
with plain arithmetic there. Here it is tested whether decodes were recorded, whether the host waits, and whether
several engines can run side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.device.staging import Staging, upload
from peerd.compute.engine.decode_graph import ROW_BUCKETS
from peerd.compute.engine.engine import Engine
from peerd.compute.model.span_model import load_span
from peerd.compute.steps import EngineStep
from peerd.protocol.rows import RowSlice, SessionSize
from peerd.protocol.span import Span

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SPAN = Span(1, 6)
WIDTH = 32
CUDA = torch.device("cuda", 0)


@pytest.fixture
def make_engine(tiny_checkpoint: Callable[[str], Path]) -> Callable[..., Engine]:
    def make(
        family: str = "llama", *, device: str = "cuda:0", dtype: torch.dtype = torch.float32, quantize: str = "none"
    ) -> Engine:
        with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
            model = load_span(
                checkpoint, SPAN, device=device, dtype=dtype, attention=register_attention(), quantize=quantize
            )
        return Engine(model, kv_tokens=1024)

    return make


def decode(engine: Engine, name: str = "a", turns: int = 4) -> torch.Tensor:
    """The results of a prefill and some decodes: `[turns + 1, width]`."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(12 + turns, WIDTH, generator=generator)
    engine.open(name, SessionSize(64, max_rollback=64))
    results = []
    for start, end in [(0, 12), *((12 + turn, 13 + turn) for turn in range(turns))]:
        engine.submit(EngineStep(name, end, (), (RowSlice(0, start, end - start),), hidden[start:end]))
        while batch := engine.plan():
            for result in engine.collect(batch, engine.run(batch)):
                assert result.error is None, result.error
                results.append(result.hidden[-1])
    engine.close(name)
    return torch.stack(results)


def graphs(engine: Engine):
    return engine._runner._graphs


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral", "stablelm", "phi3"])
def test_decodes_of_dense_families_are_recorded(make_engine, family: str):
    engine = make_engine(family)
    decode(engine)
    recorded = list(graphs(engine)._recorded.values())
    assert recorded
    assert all(each.graph is not None for each in recorded)
    assert not graphs(engine)._refused


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_quantized_blocks_decode_as_on_the_cpu_recorded_or_not(make_engine, quantize: str):
    """Says in its output which of the two it was: a library that cannot be recorded costs speed, not numbers."""
    engine = make_engine(quantize=quantize)
    found, expected = decode(engine), decode(make_engine(device="cpu", quantize=quantize))
    print(f"{quantize}: {graphs(engine)!r}")
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_blocks_that_ask_the_device_are_refused_once_and_still_right(make_engine):
    """Dynamic rotary embeddings look at lengths: that is seen before anything is recorded."""
    engine = make_engine("llama_dynamic")
    torch.testing.assert_close(decode(engine), decode(make_engine("llama_dynamic", device="cpu")), rtol=1e-3, atol=1e-3)
    assert graphs(engine)._refused == {SPAN}
    torch.testing.assert_close(decode(make_engine()), decode(make_engine(device="cpu")), rtol=1e-3, atol=1e-3)


def test_warming_up_records_every_number_of_rows_and_counts_its_memory(make_engine):
    engine = make_engine()
    engine.warm_up()
    assert {bucket.rows for bucket in graphs(engine)._recorded} == set(ROW_BUCKETS)
    made = len(graphs(engine)._recorded)
    torch.testing.assert_close(decode(engine), decode(make_engine(device="cpu")), rtol=1e-3, atol=1e-3)
    assert len(graphs(engine)._recorded) == made
    print(f"{graphs(engine).graph_bytes / 2**20:.1f} MiB of graphs")


def test_a_recorded_decode_waits_for_the_device_only_for_its_results(make_engine, monkeypatch: pytest.MonkeyPatch):
    engine = make_engine()
    engine.warm_up()
    decode(engine)
    run = graphs(engine).run

    def watched(*arguments):
        with no_waiting():
            return run(*arguments)

    monkeypatch.setattr(graphs(engine), "run", watched)
    decode(engine, "b")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_as_its_dtype(make_engine, dtype: torch.dtype):
    found, expected = decode(make_engine(dtype=dtype)), decode(make_engine(device="cpu"))
    assert found.dtype == dtype
    error = (found.float() - expected).norm() / expected.norm()
    assert error < 0.05


def test_engines_in_two_threads_record_and_run_side_by_side(make_engine):
    engines = [make_engine("llama"), make_engine("mistral")]
    expected = [decode(make_engine("llama", device="cpu")), decode(make_engine("mistral", device="cpu"))]
    found: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        engines[index].warm_up()
        for turn in range(5):
            found[index] = decode(engines[index], f"{turn}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index in range(2):
        torch.testing.assert_close(found[index], expected[index], rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_is_as_good_as_the_first(make_engine):
    first, second = make_engine(), make_engine(device="cuda:1")
    assert first._runner._pool.keys[0].device != second._runner._pool.keys[0].device
    torch.testing.assert_close(decode(second), decode(first), rtol=1e-4, atol=1e-4)


def test_staging_brings_there_and_back_what_it_was_given():
    staging = Staging(WIDTH, device=CUDA, dtype=torch.bfloat16)
    parts = [torch.randn(3, WIDTH), torch.randn(1, WIDTH, dtype=torch.float16)]
    parts[1][0, 5] = torch.inf
    for _ in range(2):
        up = staging.gather(parts, room=6)
        assert up.is_pinned()
        with no_waiting():
            there = staging.send(up)
        back, finite = staging.fetch(there)
        torch.testing.assert_close(back[:4], torch.cat([part.bfloat16() for part in parts]))
        assert not back[4:].any()
        assert finite.tolist() == [True, True, True, False, True, True]


def test_numbers_are_uploaded_without_waiting():
    with no_waiting():
        found = upload([3, 1, 4], CUDA)
    assert found.tolist() == [3, 1, 4]
    assert found.dtype == torch.int64
