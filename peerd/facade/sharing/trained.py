"""The file of what was trained beside remote blocks: prompts and a classification head, by their parameters' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from peerd.compute.checkpoint.hub.id import hub_id_of
from peerd.compute.checkpoint.hub.settings import HubSettings

TRAINED_FILE = "trained.safetensors"
_PREFIX, _DEEP, _SCORE = "prompts.prefix", "prompts.deep", "score.weight"


@dataclass(frozen=True, slots=True)
class TrainedFile:
    """What such a file holds. `where` says which it is; `digest` is that of the model it was trained for."""

    where: str
    base_model: str
    digest: str
    tensors: Mapping[str, torch.Tensor]

    @property
    def tuning(self) -> tuple[str | None, int]:
        """The `tuning_mode` and `pre_seq_len` of the prompts; None and 0 where there are none."""
        if _PREFIX not in self.tensors:
            return None, 0
        return "deep_ptune" if _DEEP in self.tensors else "ptune", len(self.tensors[_PREFIX])

    @property
    def num_labels(self) -> int | None:
        """The classes of the classification head; None where there is none."""
        return len(self.tensors[_SCORE]) if _SCORE in self.tensors else None


def write_trained(folder: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file into `folder`."""
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / TRAINED_FILE, metadata={"format": "pt", **metadata})


def read_trained(source: str | Path, hub: HubSettings | None = None) -> TrainedFile:
    """Read the file from a directory, or from a repository on the hub. Raises ValueError, OSError, CheckpointError."""
    from safetensors import SafetensorError, safe_open

    with _folder_of(source, hub) as folder:
        path = folder / TRAINED_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: save_pretrained of a remote model writes it")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    return TrainedFile(str(source), metadata.get("base_model", ""), metadata.get("model_digest", ""), tensors)


@contextmanager
def _folder_of(source: str | Path, hub: HubSettings | None) -> Iterator[Path]:
    """Where the file lies, until the block ends."""
    hub_id = hub_id_of(source)
    if hub_id is None:
        yield Path(source).expanduser()
        return
    from peerd.compute.checkpoint.hub_folder import HubFolder

    folder = HubFolder(hub_id, hub or HubSettings())
    try:
        folder.fetch([TRAINED_FILE])
        yield folder.where
    finally:
        folder.close()
