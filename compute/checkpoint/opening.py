"""Opens a checkpoint from what the user wrote: a folder, a hub id or the path of a GGUF file."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from peerd.compute.checkpoint.checkpoint import Checkpoint, read_json
from peerd.compute.checkpoint.hub.id import HubId, hub_id_of
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.compute.checkpoint.packed.packing import packing_of
from peerd.compute.checkpoint.published_config import make_config, quantization_of, text_config
from peerd.compute.checkpoint.trained import DESCRIPTION, Description, TrainedCheckpoint
from peerd.compute.checkpoint.weights import INDEX_NAME, SINGLE_NAME
from peerd.compute.errors import CheckpointError
from peerd.compute.families.lookup import family_named
from peerd.protocol.records.bodies import MAX_HUB_ID_CHARS

if TYPE_CHECKING:
    from peerd.compute.checkpoint.folder import Folder
    from peerd.compute.checkpoint.hub_folder import HubFolder


# The small files beside the weights (configuration, tokenizer, chat template). They are fetched when the model is
# opened.
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    INDEX_NAME,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def open_checkpoint(path: str | Path, *, revision: str | None = None, hub: HubSettings | None = None) -> Checkpoint:
    """Open a model directory (safetensors and `config.json`), a `.gguf` file, or a model on the hub.

    A model on the hub is written `org/name` or `org/name@revision`, a GGUF file there `org/name:Q4_K_M` or
    `org/name/file.gguf`: only its tensors that are needed are fetched. `hub` configures the downloads. A file or folder
    of that name on this machine takes precedence. Reads only headers, and fetches only small files. Raises
    CheckpointError, or its subclasses UnsupportedModelError, HubUnavailableError and DiskFullError.
    """
    hub_id = hub_id_of(path, revision)
    if hub_id is not None:
        return _open_hub(hub_id, hub or HubSettings())
    path = Path(path).expanduser()
    if (path / DESCRIPTION).is_file():
        return _open_trained(path, hub)
    if path.is_dir():
        from peerd.compute.checkpoint.folder import LocalFolder

        return _open_folder(LocalFolder(path), path.resolve().name)
    if path.is_file() and path.suffix == ".gguf":
        from peerd.compute.checkpoint.gguf.checkpoint import open_gguf

        return open_gguf(path)
    found = "is neither" if path.exists() else "does not exist; it must be"
    raise CheckpointError(
        f"{path}: {found} a directory with config.json and safetensors, or a .gguf file, or called org/name"
        " (or org/name:Q4_K_M) on the hub"
    )


def _open_trained(folder: Path, hub: HubSettings | None) -> TrainedCheckpoint:
    """Open a trained model's folder, and its base."""
    description = Description.read(folder / DESCRIPTION)
    base = open_checkpoint(description.base, hub=hub)
    try:
        if base.model_digest != description.base_digest:
            raise CheckpointError(f"{folder}: was trained from other weights than those at {description.base}")
        return TrainedCheckpoint(base, description, folder)
    except BaseException:
        base.close()
        raise


def _open_hub(hub_id: HubId, settings: HubSettings) -> Checkpoint:
    from peerd.compute.checkpoint.hub_folder import HubFolder

    folder = HubFolder(hub_id, settings)
    try:
        if hub_id.gguf:
            return _open_hub_gguf(folder, hub_id)
        _refuse_without_safetensors(folder.names(), hub_id)
        small = [name for name in _SMALL_FILES if name in folder]
        folder.fetch(small)
        disk_bytes = settings.disk_bytes
        if disk_bytes is not None:
            disk_bytes -= sum(map(folder.download_bytes, small))
        return _open_folder(folder, hub_id.name, hub_id=hub_id.repo, commit=folder.commit, disk_bytes=disk_bytes)
    except BaseException:
        folder.close()
        raise


def _open_hub_gguf(folder: HubFolder, hub_id: HubId) -> Checkpoint:
    from peerd.compute.checkpoint.gguf.checkpoint import open_gguf
    from peerd.compute.checkpoint.gguf.choose import choose_gguf

    name = choose_gguf(folder.names(), hub_id.gguf, hub_id)
    whole = f"{hub_id.repo}/{name}"
    # A longer name cannot be announced; users then name the model by its file.
    named = len(whole) <= MAX_HUB_ID_CHARS
    return open_gguf(folder.where / name, folder, hub_id=whole if named else "", commit=folder.commit if named else "")


def _refuse_without_safetensors(names: Collection[str], hub_id: HubId) -> None:
    """Raise CheckpointError if the repository has no safetensors, and say what to do about what it has instead."""
    if INDEX_NAME in names or SINGLE_NAME in names:
        return
    if any(name.endswith(".gguf") for name in names):
        from peerd.compute.checkpoint.gguf.choose import gguf_kinds

        kinds = gguf_kinds(names)
        there = f" (there is {', '.join(kinds)})" if kinds else ""
        example = f"{hub_id.repo}:{kinds[0] if kinds else 'Q4_K_M'}"
        raise CheckpointError(
            f"{hub_id} holds GGUF files: name one by how it is quantized, such as {example}{there}, or by its path, as"
            f" {hub_id.repo}/FILE.gguf"
        )
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        raise CheckpointError(
            f"{hub_id} holds only pickled weights, which could run any program when read, so peerd never reads them."
            " Choose a revision or a model with safetensors, or convert it"
        )
    raise CheckpointError(
        f"{hub_id} holds neither {SINGLE_NAME} nor {INDEX_NAME}, so it is not a model that peerd can read"
    )


def _open_folder(
    folder: Folder, name: str, *, hub_id: str = "", commit: str = "", disk_bytes: int | None = None
) -> Checkpoint:
    from peerd.compute.checkpoint.safetensors_weights import SafetensorsWeights

    config_path = folder.where / "config.json"
    published = read_json(config_path)
    fields = text_config(published)
    family = family_named(fields.get("model_type"))
    config = make_config(family, fields, config_path)
    weights = SafetensorsWeights(folder, family, packing_of(quantization_of(fields, config_path), family, config_path))
    return Checkpoint(
        folder.where,
        family,
        config,
        weights,
        name=name,
        published_config=published,
        hub_id=hub_id,
        commit=commit,
        disk_bytes=disk_bytes,
    )
