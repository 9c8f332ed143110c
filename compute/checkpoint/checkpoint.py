"""A checkpoint: the model's configuration, and the tensors of only those blocks that are wanted.

A checkpoint is a directory of safetensors with a `config.json`, a model on the hub with the same files, or one GGUF
file. The caller sees the difference only in how it is opened, and in that a hub's files are fetched when they are
needed. Nothing is ever unpickled, and no code that came with the model is run. Transformers is imported when a
checkpoint is opened, not when this file is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from peerd.compute.checkpoint.published_config import longest_length
from peerd.compute.checkpoint.weights import ReadRows, Weights
from peerd.compute.errors import CheckpointError
from peerd.compute.families.family import Family
from peerd.protocol.span import Span

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedConfig

    from peerd.compute.quantized.groups import CodeRows, Grid


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
        gguf_metadata: Callable[[], bytes | None] = lambda: None,
    ) -> None:
        self.path = path
        self.family = family
        #: The text model's configuration, unmodified.
        self.config = config
        #: The model's name for people.
        self.name = name
        #: The model's id on a hub, `org/name`, and the commit of these files; both are empty if it did not come from a
        #: hub.
        self.hub_id = hub_id
        self.commit = commit
        #: The limit for downloads of blocks, in bytes of disk; None: all that is free.
        self.disk_bytes = disk_bytes
        #: Of a GGUF file that is not here as a whole: a file of its metadata, for its tokenizer; else None.
        self.gguf_metadata = gguf_metadata
        self._weights = weights
        # The model digest needs the configuration as it was published: each version of Transformers parses it
        # differently.
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
        """Close the files."""
        self._weights.close()

    @property
    def weights(self) -> Weights:
        """The files that hold its tensors, for a checkpoint that is made from this one."""
        return self._weights

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
        """Whether the checkpoint is a GGUF file rather than a directory."""
        return self.path.suffix == ".gguf"

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype for computing if the caller chooses none: the one that the configuration declares.

        If it declares none, or one that nothing is computed in, this is the dtype of the stored tensors, as in
        Transformers. A GGUF file's weights are dequantized: for it this is fp32.
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
        """The blocks that can be read without a download."""
        return frozenset(
            block for block, names in self._names_of_block.items() if all(map(self._weights.on_disk, names))
        )

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The publisher's settings for sampling, and the ids that end a sequence."""
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
        """The publisher's way of quantizing the weights, such as `fp8`; empty if the weights are not quantized."""
        return self._weights.packing

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Read parameters one by one, each into memory of its own, in the dtype in which they are stored.

        Quantized weights are dequantized to `dtype` (fp32 if None); those of a GGUF file always to fp32. Raises
        CheckpointError.
        """
        for name in names:
            yield name, self._weights.read(name, dtype)

    def read_slices(self, name: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        """Read a parameter of three dimensions (experts) matrix by matrix, so that the caller need hold only one.

        A GGUF file's parameter is first read whole. Raises CheckpointError.
        """
        return self._weights.read_slices(name, dtype)

    def rows(self, name: str) -> ReadRows | None:
        """What reads rows of a matrix without the others, as long as the checkpoint is open; None if it is not stored
        so that they can be. Raises CheckpointError.
        """
        return self._weights.rows(name)

    def grid(self, name: str) -> Grid | None:
        """The grid of integers in which a parameter can be kept as it is stored; None if there is none."""
        return self._weights.grid(name)

    def read_codes(self, name: str) -> Iterator[CodeRows]:
        """Read a parameter that has a grid undequantized: one matrix, or one for each expert.

        Raises CheckpointError.
        """
        return self._weights.read_codes(name)

    def fetch_span(self, span: Span) -> None:
        """Download the files that hold these blocks, and keep them on this machine until the checkpoint is closed.

        Reading a tensor downloads its file too, but one file at a time. Raises CheckpointError, and what the hub's
        watcher raises.
        """
        self._weights.fetch([name for block in range(span.start, span.end) for name in self.names_of_block(block)])

    def download_bytes(self, span: Span) -> int:
        """The disk space of these blocks' files once they are downloaded, in bytes; 0 if they are local."""
        names = [name for block in range(span.start, span.end) for name in self.names_of_block(block)]
        return self._weights.download_bytes(names)

    def fetch_head(self) -> None:
        """Download the files that hold what is not a block, and keep them until the checkpoint is closed. Raises like
        `fetch_span`.
        """
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
