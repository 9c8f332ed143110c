"""The file of what was trained beside remote blocks: prompts and a classification head, by their parameters' names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peerd.compute.checkpoint.hub.id import hub_id_of
from peerd.compute.checkpoint.hub.settings import HubSettings

TRAINED_FILE = "trained.safetensors"
_CONFIG_FILE = "config.json"
_PREFIX, _DEEP, _SCORE = "prompts.prefix", "prompts.deep", "score.weight"


@dataclass(frozen=True, slots=True)
class TrainedFile:
    """What such a file holds. `where` says which it is; `digest` is that of the model it was trained for."""

    where: str
    base_model: str
    digest: str
    tensors: Mapping[str, torch.Tensor]
    #: What a classification head's classes are called: `id2label`, `label2id`, `problem_type`, where they are known.
    classes: Mapping[str, Any] = field(default_factory=dict)

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
        classes = _classes_in(folder / _CONFIG_FILE)
    return TrainedFile(str(source), metadata.get("base_model", ""), metadata.get("model_digest", ""), tensors, classes)


def classes_of(
    num_labels: int | None, given: Mapping[str, Any], trained: TrainedFile | None
) -> tuple[int, dict[str, Any]]:
    """How many classes a classifier has, and what they are called: as `given` (None: not), else as in `trained`.

    Raises ValueError if the names are not of all classes.
    """
    named = {name: value for name, value in given.items() if value is not None}
    count = num_labels or len(named.get("id2label") or named.get("label2id") or ())
    if trained is not None:
        count, named = count or trained.num_labels or 0, {**trained.classes, **named}
    count = count or 2
    for name in ("id2label", "label2id"):
        if len(named.get(name, range(count))) != count:
            raise ValueError(f"{name} names {len(named[name])} classes of {count}: name all, or leave it out")
    return count, named


def _classes_in(config: Path) -> dict[str, Any]:
    """The names of classes in a model's configuration. Raises ValueError if it is malformed."""
    try:
        fields = json.loads(config.read_bytes())
        labels = {int(number): str(label) for number, label in (fields.get("id2label") or {}).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{config} is not a model's configuration: leave it out, or save it again") from error
    found: dict[str, Any] = {}
    if labels:
        found = {"id2label": labels, "label2id": {label: number for number, label in labels.items()}}
    if isinstance(fields.get("problem_type"), str):
        found["problem_type"] = fields["problem_type"]
    return found


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
        folder.fetch([TRAINED_FILE, *({_CONFIG_FILE} & set(folder.names()))])
        yield folder.where
    finally:
        folder.close()
