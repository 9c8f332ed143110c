"""The whole GPU benchmark at toy sizes on the CPU, so that no GPU time is spent on finding its mistakes."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.compute import gpu_bench as gpu
from benchmarks.compute import gpu_swarm
from benchmarks.compute.random_checkpoint import GEOMETRIES, random_checkpoint
from peerd.compute.engine.capacity import block_bytes

CPU = torch.device("cpu")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


# bitsandbytes says what it casts.
@pytest.mark.filterwarnings("default")
def test_the_table_of_blocks_has_a_figure_of_ours_and_of_transformers_for_each_cell():
    sizes = replace(gpu.TINY, models=("llama-tiny",), contexts=(8, 16), batches=(2,), copied_bytes=1 << 16)
    lines = gpu.blocks_part(sizes, CPU)
    rows = [cells(line) for line in lines if line.startswith("| llama-tiny")]
    assert [row[1:4] for row in rows] == [
        [form, "2", context] for form in ("float32", "int8", "nf4") for context in ("8", "16")
    ]
    assert all(float(cell) > 0 for row in rows for cell in row[4:7])


def test_without_a_gpu_it_says_so_and_how_to_try_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_bench.py"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == gpu.NO_GPU
    assert "--tiny --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "gigabytes"), [("llama-3-70b", 1.71), ("bloom-176b", 4.93)])
def test_geometries_are_those_of_the_models(name: str, gigabytes: float):
    """As the publishers count them: 70.6 and 176.2 billion parameters with embeddings."""
    with random_checkpoint(name, CPU, torch.bfloat16) as checkpoint:
        assert block_bytes(checkpoint, torch.bfloat16) / 1e9 == pytest.approx(gigabytes, rel=0.01)
        vocabulary = GEOMETRIES[name]["vocab_size"] * checkpoint.hidden_size
    tables = vocabulary * (1 if name == "bloom-176b" else 2)
    total = checkpoint.block_count * block_bytes(checkpoint, torch.bfloat16) / 2 + tables
    assert total / 1e9 == pytest.approx({"llama-3-70b": 70.6, "bloom-176b": 176.2}[name], rel=0.005)


def test_random_weights_are_the_same_each_time_they_are_read():
    with random_checkpoint("bloom-tiny", CPU, torch.float32) as checkpoint:
        name = checkpoint.names_of_block(2)[3]
        (first,), (second,) = (list(checkpoint.read([name])) for _ in range(2))
    torch.testing.assert_close(first[1], second[1])


@pytest.mark.processes
def test_the_swarms_table_has_a_row_for_each_quality_of_links(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_swarm, "RTTS_MS", (100,))
    monkeypatch.setattr(gpu_swarm, "MBITS", (1000,))
    monkeypatch.setattr(gpu_swarm, "TINY", replace(gpu_swarm.TINY, steps=1))
    lines = gpu_swarm.swarm_part("bloom-tiny", CPU, torch.float32, tiny=True, blocks=None)
    (row,) = [cells(line) for line in lines if line.startswith("| 1000 Mbit/s")]
    assert row[1] == "100 ms"
    # Four links one way: a step cannot take less than two round trips.
    assert all(0 < float(cell) < 5 for cell in row[2:4])
    assert all(float(cell) > 0 for cell in row[4:])
