"""Finds an adapter's two files: in a directory, or in a repository on the hub, from which they are fetched.

The names come from untrusted sources: of a repository only these two files are fetched, and a pickle is never opened.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from peerd.compute.checkpoint.hub.id import HubId, hub_id_of
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.compute.errors import AdapterError, CheckpointError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
# peft writes a few hundred bytes; patterns for every module of a large model take some hundred KiB.
MAX_CONFIG_BYTES = 4 << 20


@contextmanager
def open_directory(source: str | Path, hub: HubSettings | None = None) -> Iterator[Path]:
    """The directory that holds an adapter's two files, which stay there until the block ends.

    source: a directory, or a text that is called `org/name` or `org/name@revision` on the hub; what is on this machine
    under such a name comes first. `hub`: how to fetch it. Raises AdapterError.
    """
    with ExitStack() as held:
        with as_adapter_errors():
            hub_id = hub_id_of(source)
            path = _local(Path(source).expanduser()) if hub_id is None else _fetched(hub_id, hub or HubSettings(), held)
        yield path


@contextmanager
def as_adapter_errors() -> Iterator[None]:
    """What goes wrong with a file or with the hub is an error of the adapter."""
    try:
        yield
    except AdapterError:
        raise
    except CheckpointError as error:
        raise AdapterError(str(error)) from error


def _local(path: Path) -> Path:
    if path.is_file():
        raise AdapterError(f"{path} is a file: an adapter is the directory with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not path.is_dir():
        raise AdapterError(f"{path} does not exist: an adapter is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}")
    _check_names({each.name for each in path.iterdir()}, path)
    return path


def _fetched(hub_id: HubId, settings: HubSettings, held: ExitStack) -> Path:
    from peerd.compute.checkpoint.hub_folder import HubFolder

    if hub_id.gguf:
        raise AdapterError(f"{hub_id}: names a GGUF file, which is no adapter")
    folder = HubFolder(hub_id, settings)
    held.callback(folder.close)
    _check_names(folder.names(), hub_id)
    if CONFIG_FILE in folder:
        check_config_size(folder.download_bytes(CONFIG_FILE), f"{hub_id}: {CONFIG_FILE}")
    folder.fetch([CONFIG_FILE, WEIGHTS_FILE])
    return folder.where


def check_config_size(n_bytes: int, where: object) -> None:
    """Raise AdapterError for a configuration that is too large to be one."""
    if n_bytes > MAX_CONFIG_BYTES:
        raise AdapterError(f"{where} has {n_bytes} bytes, over {MAX_CONFIG_BYTES}: it is no such file")


def _check_names(names: Collection[str], where: Path | HubId) -> None:
    if WEIGHTS_FILE in names:
        return
    pickled = next((name for name in PICKLED_FILES if name in names), None)
    if pickled is not None:
        raise AdapterError(
            f"{where}/{pickled} is a pickle, which runs whatever code is in it: it is never opened. Save the adapter"
            f" again with peft's save_pretrained, which writes {WEIGHTS_FILE}"
        )
    raise AdapterError(f"{where} has no {WEIGHTS_FILE}")
