"""A checkpoint: its configuration, and the tensors of just the blocks that are wanted.

A checkpoint is a directory of safetensors with a `config.json`, the same on the hub, or one GGUF file; which of them
shows only in how it is opened, and in that a hub's files are fetched when they are needed. Nothing is ever unpickled
and no code that came with it is run. Knows no devices and no modules; Transformers is imported when a checkpoint is
opened, not when this file is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from peerd.compute.checkpoint.published_config import longest_length
from peerd.compute.checkpoint.weights import Weights
from peerd.compute.errors import CheckpointError
from peerd.compute.families.family import Family
from peerd.protocol.span import Span

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedConfig


class Checkpoint:
    """An open checkpoint of one language model. Use it as a context manager, or `close` it."""

    def __init__(
        self,
        path: Path,
        family: Family,
        config: PreTrainedConfig,
        weights: Weights,
        *,
        name: str,
        published_config: Mapping[str, Any],
        hub_id: str = "",
        commit: str = "",
        disk_bytes: int | None = None,
    ) -> None:
        self.path = path
        self.family = family
        #: The text model's configuration, unmodified.
        self.config = config
        #: What people call the model.
        self.name = name
        #: Where it is on a hub, `org/name`, and of which commit these files are; both empty for one from elsewhere.
        self.hub_id = hub_id
        self.commit = commit
        #: What downloads of blocks may take of the disk; None: all that is free.
        self.disk_bytes = disk_bytes
        self._weights = weights
        # What came beside the weights files and is not in them: other versions of Transformers read it otherwise.
        self._published_config = published_config
        self._names_of_block = self._by_block()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.name} blocks={self.block_count} bytes_read={self.bytes_read}>"

    def close(self) -> None:
        """Let go of the files."""
        self._weights.close()

    @property
    def block_count(self) -> int:
        """How many blocks the model has."""
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states that travel between blocks."""
        return int(self.config.hidden_size)

    @property
    def max_length(self) -> int | None:
        """How many positions the model was made for; None where its position scheme has no limit (ALiBi)."""
        return longest_length(self.config)

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file rather than a directory."""
        return self.path.suffix == ".gguf"

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the weights are computed in unless somebody says otherwise: what the configuration declares.

        Where it declares none, or one that nothing is computed in, it is that of the stored tensors, as in
        Transformers; fp32 for a GGUF file, whose weights are dequantized.
        """
        import torch

        if self.is_gguf:
            return torch.float32
        declared: torch.dtype | None = getattr(torch, str(self.config.dtype).removeprefix("torch."), None)
        if declared is not None and declared in (torch.float32, torch.float16, torch.bfloat16):
            return declared
        stored = {self._weights.stored_dtype(name) for name in self.names_of_block(0)}
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            if dtype in stored:
                return torch.float32 if dtype == torch.float64 else dtype
        return torch.float32

    @property
    def bytes_read(self) -> int:
        """How many bytes of the weights files were read so far, headers included."""
        return self._weights.bytes_read

    @property
    def blocks_on_disk(self) -> frozenset[int]:
        """The blocks that can be read without fetching anything."""
        return frozenset(
            block for block, names in self._names_of_block.items() if all(map(self._weights.on_disk, names))
        )

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """How the publisher means the model to be sampled, and the ids that end a sequence."""
        from transformers import GenerationConfig

        path = self.path / "generation_config.json"
        if self.is_gguf or not path.exists():
            return GenerationConfig.from_model_config(self.config)
        return GenerationConfig.from_dict(read_json(path))

    def has(self, name: str) -> bool:
        """Whether the checkpoint stores this parameter."""
        return name in self._weights.parameters

    def names_of_block(self, block: int) -> tuple[str, ...]:
        """The parameters of one block by the decoder's names, such as `layers.7.mlp.down_proj.weight`.

        Raises IndexError for a block that the model doesn't have.
        """
        if not 0 <= block < self.block_count:
            raise IndexError(f"{self.name} has blocks 0 to {self.block_count - 1}, not {block}")
        return self._names_of_block.get(block, ())

    @property
    def packing(self) -> str:
        """How the publisher quantized the weights, such as `fp8`; empty where they are plain."""
        return self._weights.packing

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Read parameters one by one, each in memory of its own, in the dtype they are stored in.

        What its publisher quantized comes dequantized, in `dtype` (fp32 if None); of a GGUF file always in fp32.
        Raises CheckpointError.
        """
        for name in names:
            yield name, self._weights.read(name, dtype)

    def read_slices(self, name: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        """Read a parameter of three dimensions matrix by matrix (experts), so that only one need be held.

        A GGUF file is read whole first. Raises CheckpointError.
        """
        return self._weights.read_slices(name, dtype)

    def fetch_span(self, span: Span) -> None:
        """Have the files that hold these blocks on this machine, until the checkpoint is closed.

        Reading fetches too, but file by file. Raises CheckpointError, and what the hub's watcher raises.
        """
        self._weights.fetch([name for block in range(span.start, span.end) for name in self.names_of_block(block)])

    def download_bytes(self, span: Span) -> int:
        """What these blocks' files take of the disk once they are downloaded; 0 where they never are."""
        names = [name for block in range(span.start, span.end) for name in self.names_of_block(block)]
        return self._weights.download_bytes(names)

    def fetch_head(self) -> None:
        """The same for the files that hold what is not a block."""
        of_blocks = {name for names in self._names_of_block.values() for name in names}
        self._weights.fetch([name for name in self._weights.parameters if name not in of_blocks])

    @cached_property
    def model_digest(self) -> bytes:
        """32 bytes that two checkpoints share if and only if they are the same model in the same files.

        Reads every weights file of this machine once; what was found is remembered across runs. Of files on the hub
        it needs only what the hub lists. Raises CheckpointError.
        """
        from peerd.compute.checkpoint.digests import model_digest

        return model_digest(self._published_config, self._weights.digests())

    def block_digest(self, block: int) -> bytes:
        """32 bytes over the block's tensors as they are stored: names, dtypes, shapes and bytes."""
        from peerd.compute.checkpoint.digests import tensors_digest

        names = self.names_of_block(block)
        return tensors_digest(stored for name in names for stored in self._weights.stored(name))

    def _by_block(self) -> dict[int, tuple[str, ...]]:
        """The names of each block's parameters, sorted."""
        found: dict[int, list[str]] = {}
        for name in sorted(self._weights.parameters):
            layers, _, rest = name.partition(".")
            number = rest.partition(".")[0]
            if layers == self.family.layers and number.isdecimal():
                found.setdefault(int(number), []).append(name)
        return {block: tuple(names) for block, names in found.items()}


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value
