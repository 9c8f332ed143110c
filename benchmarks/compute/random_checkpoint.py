"""Checkpoints without a download: the published shapes of large models, with random weights made on demand.

A tensor is made when it is read, on the device where it is needed. So a machine can load a model of 350 GB block by
block without ever holding it. The same name gives the same numbers on the same kind of device.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.published_config import make_config
from peerd.compute.checkpoint.weights import StoredBytes
from peerd.compute.families.lookup import family_named
from peerd.compute.families.meta_build import build_on_meta
from peerd.compute.quantized.groups import CodeRows

#: The values of the publishers' configurations, by name.
GEOMETRIES: Mapping[str, dict[str, Any]] = {
    "llama-3-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "vocab_size": 128256,
    },
    "bloom-176b": {
        "model_type": "bloom",
        "hidden_size": 14336,
        "n_layer": 70,
        "n_head": 112,
        "vocab_size": 250880,
        "apply_residual_connection_post_layernorm": False,
    },
    "llama-tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    },
    "bloom-tiny": {"model_type": "bloom", "hidden_size": 64, "n_layer": 6, "n_head": 4, "vocab_size": 128},
}


class RandomWeights:
    """`peerd.compute.checkpoint.weights.Weights` with random numbers."""

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device, dtype: torch.dtype) -> None:
        self._shapes = shapes
        self._device = device
        self._dtype = dtype
        self.bytes_read = 0

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def digests(self) -> Mapping[str, bytes]:
        """There are no files, so there are no digests."""
        return {}

    def fetch(self, parameters: Iterable[str]) -> None:
        """Nothing needs a download."""

    def on_disk(self, parameter: str) -> bool:
        """Always true: a tensor is made when it is read."""
        return True

    def download_bytes(self, parameters: Iterable[str]) -> int:
        """Nothing is downloaded."""
        return 0

    @property
    def packing(self) -> str:
        """The weights are plain."""
        return ""

    def stored_dtype(self, parameter: str) -> torch.dtype | None:
        """The dtype of every parameter."""
        return self._dtype

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Make one parameter in the dtype of all. `dtype` is for packed parameters only."""
        shape = self._shapes[parameter]
        self.bytes_read += shape.numel() * self._dtype.itemsize
        if len(shape) == 1:
            make = torch.zeros if parameter.endswith("bias") else torch.ones
            return make(shape, device=self._device, dtype=self._dtype)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(parameter.encode()))
        # The values are so small that the sum of some eighty blocks stays in range.
        values = torch.randn(shape, generator=generator, device=self._device, dtype=self._dtype)
        return values.mul_(0.3 * shape[-1] ** -0.5)

    def read_slices(self, parameter: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        yield from self.read(parameter)

    def rows(self, parameter: str) -> None:
        """There is no file to read them from."""

    def grid(self, parameter: str) -> None:
        """The weights are plain."""

    def read_codes(self, parameter: str) -> Iterator[CodeRows]:
        raise ValueError(f"{parameter} has no grid")

    def stored(self, parameter: str) -> Iterator[StoredBytes]:
        """Nothing is stored, so a digest covers names and shapes."""
        yield StoredBytes(parameter, "random", tuple(self._shapes[parameter]), memoryview(b""))

    def close(self) -> None:
        """There is nothing to close."""


def random_checkpoint(name: str, device: str | torch.device, dtype: torch.dtype) -> Checkpoint:
    """A checkpoint of one of `GEOMETRIES`, whose tensors are made on `device`."""
    return checkpoint_of(name, GEOMETRIES[name], device, dtype)


def checkpoint_of(name: str, fields: Mapping[str, Any], device: str | torch.device, dtype: torch.dtype) -> Checkpoint:
    """A checkpoint of these fields of a configuration, whose tensors are made on `device`."""
    fields = {**fields, "dtype": str(dtype).removeprefix("torch.")}
    family = family_named(fields["model_type"])
    config = make_config(family, dict(fields), name)
    decoder = build_on_meta(family.decoder_type(), config, dtype)
    shapes = {key: tensor.shape for key, tensor in decoder.state_dict().items()}
    weights = RandomWeights(shapes, torch.device(device), dtype)
    return Checkpoint(Path(name), family, config, weights, name=name, published_config=fields)
