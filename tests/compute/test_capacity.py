"""What fits is computed from the configuration and from what this process may really take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peerd.compute.capacity import HEADROOM, block_bytes, fits, free_memory, kv_bytes_per_token
from peerd.compute.checkpoint import Checkpoint, open_checkpoint
from peerd.compute.span_model import load_span
from peerd.protocol.span import Span

TinyCheckpoint = Callable[[str], Path]

MEMINFO = "MemTotal: 4000000 kB\nMemFree: 1000 kB\nMemAvailable: 3000000 kB\n"


@pytest.fixture
def llama(tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    with open_checkpoint(tiny_checkpoint("llama")) as checkpoint:
        return checkpoint


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., Path]:
    """A machine's /proc and /sys, with the limits of control groups."""

    def make(own: str | None, **groups: tuple[str, int, int]) -> Path:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/meminfo").write_text(MEMINFO)
        if own is not None:
            (tmp_path / "proc/self/cgroup").write_text(own)
        for name, (limit, current, inactive) in groups.items():
            folder = tmp_path / "sys/fs/cgroup" / name.replace("__", "/")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "memory.max").write_text(f"{limit}\n")
            (folder / "memory.current").write_text(f"{current}\n")
            (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")
        return tmp_path

    return make


def test_a_block_takes_what_its_tensors_take(tiny_checkpoint: TinyCheckpoint, tiny_name: str) -> None:
    with open_checkpoint(tiny_checkpoint(tiny_name)) as checkpoint:
        span = load_span(checkpoint, Span(0, 8))
        sizes = [sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in span.layers]
        assert block_bytes(checkpoint, torch.float32) == max(sizes)
        assert block_bytes(checkpoint, torch.bfloat16) == max(sizes) // 2


def test_sizes_are_known_without_any_weights_file_being_read(tiny_checkpoint: TinyCheckpoint) -> None:
    with open_checkpoint(tiny_checkpoint("mixtral")) as checkpoint:
        before = checkpoint.bytes_read
        assert fits(checkpoint, 2**40, dtype=torch.float16) == 8
        assert checkpoint.bytes_read == before


def test_kv_takes_keys_and_values_of_every_head(llama: Checkpoint) -> None:
    assert kv_bytes_per_token(llama, torch.float16) == 2 * 2 * 16 * 2


def test_as_many_blocks_fit_as_memory_holds_with_their_kv(llama: Checkpoint) -> None:
    each = block_bytes(llama, torch.float32) + 100 * kv_bytes_per_token(llama, torch.float32)
    room = each / (1 - HEADROOM)
    assert fits(llama, 0, dtype=torch.float32) == 0
    assert fits(llama, int(room * 0.99), dtype=torch.float32, kv_tokens=100) == 0
    assert fits(llama, int(room * 3.01), dtype=torch.float32, kv_tokens=100) == 3
    assert fits(llama, int(room * 1000), dtype=torch.float32, kv_tokens=100) == 8


def test_without_a_wish_there_is_room_for_the_models_context(llama: Checkpoint) -> None:
    room = 10 * block_bytes(llama, torch.float32)
    assert fits(llama, room, dtype=torch.float32) == fits(llama, room, dtype=torch.float32, kv_tokens=512)


def test_without_control_groups_the_machine_decides(machine: Callable[..., Path]) -> None:
    assert free_memory(root=machine(None)) == 3_000_000 * 1024


def test_the_tightest_group_decides_and_gives_back_its_file_cache(machine: Callable[..., Path]) -> None:
    root = machine(
        "0::/box/inner\n",
        box=("1000000", 900_000, 50_000),
        box__inner=("max", 800_000, 0),
    )
    assert free_memory(root=root) == 150_000


def test_a_group_over_its_limit_leaves_nothing(machine: Callable[..., Path]) -> None:
    assert free_memory(root=machine("0::/box\n", box=("1000", 5000, 0))) == 0


def test_this_machine_has_some_memory_left() -> None:
    assert free_memory() > 0
