"""Reads one block's tensors from a checkpoint into its module, and quantizes them on the way if asked to.

Weights that are published as integers in groups can also be kept as they are: then they are never dequantized here.

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
from peerd.compute.model.stored_as import forms_of
from peerd.compute.quantized.formats import NONE, Format
from peerd.compute.quantized.group_matrix import GroupMatrix
from peerd.compute.quantized.groups import GroupForm
from peerd.compute.quantized.modules import Quantizable, put_quantized

if TYPE_CHECKING:
    from peerd.compute.checkpoint.checkpoint import Checkpoint


def load_block(
    layer: nn.Module, checkpoint: Checkpoint, block: int, device: torch.device, quantize: str = NONE
) -> None:
    """Read the tensors that the block needs. Others in the checkpoint, such as old buffers, are left alone.

    `quantize` is `none`, `packed`, `int8` or `nf4`. Raises CheckpointError, UnsupportedModelError, and KeyError for
    another format.
    """
    prefix = f"{checkpoint.family.layers}.{block}."
    dtypes = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    for name, (target, form) in forms_of(layer, checkpoint, prefix, quantize).items():
        dtype = dtypes.pop(name)
        if isinstance(form, GroupForm):
            _load_packed(layer, target, form, checkpoint, device, prefix)
        else:
            sources = _sources(checkpoint, prefix, target, dtype)
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


def _load_packed(
    layer: nn.Module, target: Quantizable, form: GroupForm, checkpoint: Checkpoint, device: torch.device, prefix: str
) -> None:
    name, sources = f"{prefix}{target.name}", list(checkpoint.read_codes(f"{prefix}{target.name}"))
    if len(sources) != target.count:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name} has {len(sources)} experts, the configuration says {target.count}"
        )
    for matrix, source in zip(put_quantized(layer, target, form, device), sources, strict=True):
        if source.shape != (target.rows, target.columns):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {list(source.shape)}, the configuration says"
                f" {[target.rows, target.columns]}"
            )
        assert isinstance(matrix, GroupMatrix)
        matrix.store_codes(source)
