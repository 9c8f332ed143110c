"""How much memory blocks and KV take, and how many blocks fit into what is free.

Sizes come from the configuration alone, by building the model without its weights: no weights file need be
there yet. Free memory is what this process may still take: a container's limit counts as much as the machine's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peerd.compute.cut_model import build_on_meta
from peerd.compute.layer_kinds import layer_kinds

if TYPE_CHECKING:
    from peerd.compute.checkpoint import Checkpoint

# Beside blocks and KV there are activations, network buffers and the rest of the machine.
HEADROOM = 0.15
# Where the caller names no number: what one long conversation takes.
DEFAULT_KV_TOKENS = 8192


def block_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """How many bytes the model's largest block takes in `dtype`."""
    decoder = build_on_meta(checkpoint.family.decoder_type(), checkpoint.config, dtype)
    layers: Iterable[torch.nn.Module] = getattr(decoder, checkpoint.family.layers)
    return max(sum(int(tensor.nbytes) for tensor in layer.state_dict().values()) for layer in layers)


def kv_bytes_per_token(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """How many bytes one position takes in the KV cache of one block; of the largest, where they differ."""
    return max(kind.values_per_token for kind in layer_kinds(checkpoint.config)) * dtype.itemsize


def fits(checkpoint: Checkpoint, free_bytes: int, *, dtype: torch.dtype, kv_tokens: int = 0) -> int:
    """How many blocks fit into `free_bytes`, each with KV for `kv_tokens` positions, with head-room to spare.

    With `kv_tokens` 0 there is room for one conversation: the model's context, or 8192 positions if that is less.
    Never more than the model has; 0 if not even one block fits.
    """
    tokens = kv_tokens or min(checkpoint.max_length or DEFAULT_KV_TOKENS, DEFAULT_KV_TOKENS)
    each = block_bytes(checkpoint, dtype) + kv_bytes_per_token(checkpoint, dtype) * tokens
    return max(0, min(checkpoint.block_count, int(free_bytes * (1 - HEADROOM)) // each))


def free_memory(device: str | torch.device = "cpu", *, root: Path = Path("/")) -> int:
    """How many bytes can still be allocated on a device: for the CPU, the least that the machine and every control
    group around this process leave. `root` is where `proc` and `sys` are found. Linux only.
    """
    device = torch.device(device)
    if device.type != "cpu":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    limits = [_available(root / "proc/meminfo"), *_left_by_groups(root)]
    return max(0, min(limits))


def _available(meminfo: Path) -> int:
    """The kernel's own estimate of what can be taken without swapping."""
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.removesuffix("kB")) * 1024
    raise OSError(f"{meminfo} does not say MemAvailable")


def _left_by_groups(root: Path) -> list[int]:
    """What each control group (version 2) around this process leaves; unlimited ones are left out."""
    try:
        own = (root / "proc/self/cgroup").read_text()
    except FileNotFoundError:
        return []
    path = next((line[3:] for line in own.splitlines() if line.startswith("0::")), "/")
    mount = root / "sys/fs/cgroup"
    group = mount / path.strip().lstrip("/")
    left = [_left_by(folder) for folder in (group, *group.parents) if folder.is_relative_to(mount)]
    return [bytes_left for bytes_left in left if bytes_left is not None]


def _left_by(group: Path) -> int | None:
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        # The file cache is counted as used, but given back on demand.
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(statistics.get("inactive_file", 0))
    except FileNotFoundError:
        return None
