"""Reads one block's tensors from a checkpoint into its module, and quantizes them on the way if asked to.

Memory must stay small meanwhile: a quantized tensor's source is dropped before the next is read, and experts are
read one at a time. So loading a span takes the span's final size, and less than one block beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from peerd.compute.device.free_memory import trim_heap
from peerd.compute.errors import CheckpointError
from peerd.compute.families.meta_build import check_tensor, fill
from peerd.compute.quantized.formats import FORMATS, NONE, Format
from peerd.compute.quantized.modules import Quantizable, put_quantized, quantizables

if TYPE_CHECKING:
    from peerd.compute.checkpoint.checkpoint import Checkpoint


def load_block(
    layer: nn.Module, checkpoint: Checkpoint, block: int, device: torch.device, quantize: str = NONE
) -> None:
    """Read the tensors that the block needs. Others in the checkpoint, such as old buffers, are left alone.

    `quantize` is `none`, `int8` or `nf4`. Raises CheckpointError, UnsupportedModelError, and KeyError for another
    format.
    """
    prefix = f"{checkpoint.family.layers}.{block}."
    dtypes = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    if quantize != NONE:
        form = FORMATS[quantize]
        for name, target in quantizables(layer).items():
            sources = _sources(checkpoint, prefix, target, dtypes.pop(name))
            _load_quantized(layer, target, form, sources, device, checkpoint.path, prefix)
    tensors = (
        (name, tensor) for name, dtype in dtypes.items() for _, tensor in checkpoint.read([f"{prefix}{name}"], dtype)
    )
    fill(layer, tensors, device, checkpoint.path, prefix=prefix)
    trim_heap()


def _sources(checkpoint: Checkpoint, prefix: str, target: Quantizable, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The stored matrices of a parameter; each is read when the caller asks for it."""
    if target.stacked:
        yield from checkpoint.read_slices(f"{prefix}{target.name}", dtype)
    else:
        yield from (tensor for _, tensor in checkpoint.read([f"{prefix}{target.name}"], dtype))


def _load_quantized(
    layer: nn.Module,
    target: Quantizable,
    form: Format,
    sources: Iterator[torch.Tensor],
    device: torch.device,
    where: object,
    prefix: str,
) -> None:
    expected = (target.columns, target.rows) if target.transposed else (target.rows, target.columns)
    for matrix in put_quantized(layer, target, form, device):
        source = next(sources, None)
        if source is None:
            raise CheckpointError(f"{where}: tensor {prefix}{target.name} has fewer than {target.count} experts")
        check_tensor(f"{prefix}{target.name}", source, expected, where)
        matrix.store(source)
        # Otherwise the loop would let go of this source only after reading the next.
        del source
    if next(sources, None) is not None:
        raise CheckpointError(f"{where}: tensor {prefix}{target.name} has more than {target.count} experts")
