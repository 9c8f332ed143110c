"""Reading one block's tensors from a checkpoint into its module: no more is in memory than the block itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from peerd.compute.cut_model import fill

if TYPE_CHECKING:
    from peerd.compute.checkpoint import Checkpoint


def load_block(layer: nn.Module, checkpoint: Checkpoint, block: int, device: torch.device) -> None:
    """Read what the block needs. What else the checkpoint has of it, such as old buffers, is left alone."""
    prefix = f"{checkpoint.family.layers}.{block}."
    tensors = checkpoint.read(f"{prefix}{name}" for name in layer.state_dict())
    fill(layer, ((name.removeprefix(prefix), tensor) for name, tensor in tensors), device, checkpoint.path)
