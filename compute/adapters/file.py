"""Reads an adapter as peft writes it: a directory with `adapter_config.json` and `adapter_model.safetensors`.

The files come from untrusted sources: a pickle is never opened, sizes are checked before anything is read, and if a
stored tensor is one that we do not run, the whole adapter is refused. Only the requested blocks are read. Tensors
have the names of the whole model, with peft's prefix.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerd.compute.adapters.base import ANY_BASE, TrainedFor, trained_for
from peerd.compute.adapters.config import LoraConfig, parse_config
from peerd.compute.adapters.lora import BlockModule, LoraPair
from peerd.compute.adapters.source import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    as_adapter_errors,
    check_config_size,
    open_directory,
)
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.compute.checkpoint.parameter_names import PREFIXES
from peerd.compute.checkpoint.safetensors_file import SafetensorsFile, StoredTensor
from peerd.compute.errors import AdapterError
from peerd.compute.families.family import Family
from peerd.protocol.span import MAX_BLOCKS, Span

# peft's prefix before the model's own names.
_PEFT_PREFIX = "base_model.model."
_FLOATS = ("F32", "F16", "BF16")
_STORED = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_OTHER_KINDS: Mapping[str, str] = {
    "lora_embedding_": "embeddings are the client's, not a block's",
    "lora_magnitude_vector": "DoRA rescales whole weights",
    "modules_to_save": "whole modules that were trained are not LoRA",
    ".bias": "biases are not adapted",
}


@dataclass(frozen=True, slots=True)
class _StoredPair:
    """The two stored matrices of one module. `module`: its name in the whole model."""

    module: str
    rank: int
    scale: float
    a: StoredTensor
    b: StoredTensor


class AdapterFile:
    """An open adapter for models of one family. Made by `open_adapter`.

    `digest`: 32 bytes that are equal for copies of the same weights with the same scales. `base`: the model that it
    was trained for.
    """

    def __init__(
        self, path: Path, config: LoraConfig, base: TrainedFor, tensors: SafetensorsFile, family: Family
    ) -> None:
        self.path = path
        self.config = config
        self.base = base
        self._tensors = tensors
        self._root, self._pairs = _pairs(tensors, config, family, path)
        self._digest: bytes | None = None

    def __repr__(self) -> str:
        return f"<AdapterFile {self.path} modules={len(self._pairs)}>"

    @property
    def modules(self) -> Mapping[BlockModule, tuple[int, int]]:
        """The adapted layers, with the (out_features, in_features) of each."""
        return {key: (pair.b.shape[0], pair.a.shape[1]) for key, pair in self._pairs.items()}

    @property
    def digest(self) -> bytes:
        """sha256 over the weights file's sha256, then each module's name, a zero byte and its scale.

        spec/sessions/adapters.md defines it. The first call reads the whole file.
        """
        if self._digest is None:
            with (self.path / WEIGHTS_FILE).open("rb") as file:
                digest = hashlib.sha256(hashlib.file_digest(file, "sha256").digest())
            for pair in sorted(self._pairs.values(), key=lambda pair: pair.module):
                digest.update(pair.module.encode() + b"\0" + struct.pack(">d", pair.scale))
            self._digest = digest.digest()
        return self._digest

    def targets(self, block: int, module: str) -> bool:
        """Whether the configuration's list of targets names this module of a block, whatever is stored."""
        return self.config.targets_module(f"{self._root}.{block}.{module}", block)

    def check_base(self, model_digest: bytes) -> None:
        """Raise AdapterError if the files say that the adapter was trained for a model of another digest."""
        wrong = self.base.mismatch(model_digest.hex())
        if wrong is not None:
            raise AdapterError(f"{self.path} {wrong}: {ANY_BASE}")

    def check_complete(self, adaptable: Iterable[BlockModule]) -> None:
        """Raise AdapterError if the list of targets names one of these layers that the file has no weights for."""
        for block, name in adaptable:
            if self.targets(block, name) and (block, name) not in self._pairs:
                raise AdapterError(
                    f"{self.path}: it names {name} of block {block} as adapted, and has no weights for it"
                )

    def n_values(self, blocks: Span | None = None) -> int:
        """The number of values in the matrices; of those of `blocks`, if given."""
        return sum(math.prod(pair.a.shape) + math.prod(pair.b.shape) for _, pair in self._within(blocks))

    def n_bytes(self, blocks: Span | None = None) -> int:
        """The bytes of the stored matrices; of those of `blocks`, if given."""
        return sum(pair.a.n_bytes + pair.b.n_bytes for _, pair in self._within(blocks))

    def read(self, blocks: Span | None = None) -> dict[BlockModule, LoraPair]:
        """The weights of `blocks` (default: all), as stored, on the CPU.

        Raises AdapterError for a value that is NaN or infinite, and if the file has changed meanwhile.
        """
        return {key: self._read(pair) for key, pair in self._within(blocks)}

    def _within(self, blocks: Span | None) -> Iterator[tuple[BlockModule, _StoredPair]]:
        for key, pair in self._pairs.items():
            if blocks is None or blocks.start <= key[0] < blocks.end:
                yield key, pair

    def _read(self, pair: _StoredPair) -> LoraPair:
        with as_adapter_errors():
            a, b = self._tensors.read(pair.a.name), self._tensors.read(pair.b.name)
        for tensor, stored in ((a, pair.a), (b, pair.b)):
            if not tensor.isfinite().all():
                raise AdapterError(f"{self.path}: tensor {stored.name} has a value that is not finite")
        return LoraPair(a, b, pair.scale)


@contextmanager
def open_adapter(source: str | Path, family: Family, hub: HubSettings | None = None) -> Iterator[AdapterFile]:
    """Open an adapter in peft's format, for models of `family`: a directory, or a hub id. Raises AdapterError."""
    with open_directory(source, hub) as path:
        fields = _read_config(path / CONFIG_FILE)
        config = parse_config(fields, path / CONFIG_FILE)
        with as_adapter_errors():
            tensors = SafetensorsFile(path / WEIGHTS_FILE)
        with tensors:
            yield AdapterFile(path, config, trained_for(fields, tensors.metadata), tensors, family)


def _read_config(path: Path) -> Any:
    try:
        check_config_size(path.stat().st_size, path)
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON") from error
    return fields


def _pairs(
    tensors: SafetensorsFile, config: LoraConfig, family: Family, where: Path
) -> tuple[str, dict[BlockModule, _StoredPair]]:
    """The name of the whole model's block list, and the adapter's pairs of matrices by block and module.

    What peft leaves out, as the configuration does not mean it, is left out. Raises AdapterError for any other tensor
    that we would have to leave out.
    """
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in tensors.tensors.items():
        match = _STORED.fullmatch(name)
        if match is None or not name.startswith(_PEFT_PREFIX):
            reason = next((why for kind, why in _OTHER_KINDS.items() if kind in name), "it is no LoRA matrix")
            raise AdapterError(f"{where}: tensor {name} is not run: {reason}")
        if stored.dtype not in _FLOATS or len(stored.shape) != 2 or 0 in stored.shape:
            raise AdapterError(f"{where}: tensor {name} is {stored.dtype} {list(stored.shape)}, not a matrix of floats")
        modules.setdefault(match["module"].removeprefix(_PEFT_PREFIX), {})[match["side"]] = stored
    if not modules:
        raise AdapterError(f"{where}: it holds no LoRA matrix")
    split_names = {
        module: split
        for module in modules
        if not config.leaves_out(module, (split := _split_name(module, family, where))[1])
    }
    if not split_names:
        raise AdapterError(f"{where}: its configuration targets none of the modules that it holds matrices for")
    found = {
        (block, name): _pair(module, modules[module], config, where) for module, (_, block, name) in split_names.items()
    }
    roots = {root for root, _, _ in split_names.values()}
    if len(found) < len(split_names) or len(roots) > 1:
        raise AdapterError(f"{where}: it adapts one module of the model under two names")
    return roots.pop(), found


def _pair(module: str, sides: Mapping[str, StoredTensor], config: LoraConfig, where: Path) -> _StoredPair:
    if len(sides) < 2:
        raise AdapterError(f"{where}: {module} has only one of its two matrices")
    a, b, rank = sides["A"], sides["B"], config.rank_of(module)
    if a.shape[0] != rank or b.shape[1] != rank or a.dtype != b.dtype:
        shapes = f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        raise AdapterError(f"{where}: {module} has matrices of {shapes}, which do not have rank {rank}")
    return _StoredPair(module, rank, config.scale_of(module), a, b)


def _split_name(module: str, family: Family, where: Path) -> tuple[str, int, str]:
    """Split a module's name in the whole model: the block list's name, the block's number, and the name in the
    block.
    """
    for prefix in PREFIXES:
        root = f"{prefix}{family.layers}"
        match = re.fullmatch(rf"{re.escape(root)}\.(\d{{1,4}})\.(.+)", module)
        if match is not None and int(match[1]) < MAX_BLOCKS:
            name = match[2]
            for old, new in family.renamed:
                name = name.replace(old, new)
            return root, int(match[1]), name
    raise AdapterError(f"{where}: it adapts {module}, which is no part of a block of a {family.model_type}: not run")
