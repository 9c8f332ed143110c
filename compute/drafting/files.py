"""The files of a draft head: a folder with a configuration and safetensors, here or in a repository on a hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from peerd.compute.checkpoint.checkpoint import read_json
from peerd.compute.checkpoint.hub.id import hub_id_of
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.compute.checkpoint.safetensors_file import SafetensorsFile
from peerd.compute.checkpoint.trained import write_tensors
from peerd.compute.drafting.network import DraftNetwork, DraftShape
from peerd.compute.errors import CheckpointError

CONFIG_FILE: Final = "config.json"
WEIGHTS_FILE: Final = "model.safetensors"
CARD_FILE: Final = "README.md"
#: In the configuration's `model_type`, by which a draft head is told from a model.
MODEL_TYPE: Final = "peerd-draft-head"


@dataclass(frozen=True, slots=True)
class DraftHeadFacts:
    """What a head was made for, and how good it was.

    model: the model's name or hub id. digest: the model's, in hexadecimal. accepted: for each place of a draft, the
    share of held-out guesses that were right, where those before them were.
    """

    model: str
    digest: str
    accepted: tuple[float, ...] = ()


def write_head(folder: Path, network: DraftNetwork, facts: DraftHeadFacts) -> None:
    """Write a head into a folder, which is made if it is missing. Raises CheckpointError."""
    config = {
        "model_type": MODEL_TYPE,
        "architectures": ["DraftNetwork"],
        "drafts_for": facts.model,
        "drafts_for_digest": facts.digest,
        "accepted": [round(share, 4) for share in facts.accepted],
        **asdict(network.shape),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS_FILE, {name: value.cpu() for name, value in network.state_dict().items()})
        (folder / CARD_FILE).write_text(_card(facts))
        # The configuration last: a folder that has it is whole.
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error


def _card(facts: DraftHeadFacts) -> str:
    base = f"base_model: {facts.model}\n" if "/" in facts.model and not facts.model.startswith("/") else ""
    shares = ", ".join(f"{share:.0%}" for share in facts.accepted)
    return (
        f"---\n{base}library_name: peerd\n---\n\n# A draft head for {facts.model}\n\n"
        "It guesses tokens from the model's last hidden states, so that a swarm checks several in one step. The answers"
        f" are the model's own.\n\n    peerd generate {facts.model} --draft THIS --bootstrap ... --prompt ...\n\n"
        f"Right guesses on held-out text, by their place in a draft: {shares or 'not measured'}.\n"
    )


@contextmanager
def open_draft_folder(source: str | Path, hub: HubSettings | None = None) -> Iterator[Path | None]:
    """The folder with a draft head's files, until the block ends; None if what `source` names is not a draft head.

    source: a folder, or a repository on the hub, of which only the configuration is fetched before it is known to be
    one. Raises CheckpointError.
    """
    with ExitStack() as held:
        hub_id = hub_id_of(source)
        if hub_id is None:
            path = Path(source).expanduser()
            yield path if _is_head(path) else None
            return
        from peerd.compute.checkpoint.hub_folder import HubFolder

        folder = HubFolder(hub_id, hub or HubSettings())
        held.callback(folder.close)
        if hub_id.gguf or CONFIG_FILE not in folder:
            yield None
            return
        folder.fetch([CONFIG_FILE])
        if not _is_head(folder.where):
            yield None
            return
        folder.fetch([WEIGHTS_FILE])
        yield folder.where


def _is_head(folder: Path) -> bool:
    path = folder / CONFIG_FILE
    return path.is_file() and read_json(path).get("model_type") == MODEL_TYPE


def read_head(folder: Path) -> tuple[DraftNetwork, DraftHeadFacts]:
    """A draft head, in fp32 on the CPU. Raises CheckpointError for files that are missing or malformed."""
    config = read_json(folder / CONFIG_FILE)
    shape, facts = _shape(config, folder), _facts(config, folder)
    # On the meta device nothing is allocated before the file is known to have all of it.
    with torch.device("meta"):
        network = DraftNetwork(shape)
    wanted = network.state_dict()
    with SafetensorsFile(folder / WEIGHTS_FILE) as file:
        _check(file, wanted, folder)
        network.load_state_dict({name: file.read(name) for name in wanted}, assign=True)
    if not bool(((network.tokens >= 0) & (network.tokens < shape.vocab_size)).all()):
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: `tokens` has ids outside a vocabulary of {shape.vocab_size}")
    return network.requires_grad_(False).eval(), facts


def _shape(config: Mapping[str, Any], folder: Path) -> DraftShape:
    values = {name: config.get(name) for name in DraftShape.__dataclass_fields__}
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 24:
            raise CheckpointError(f"{folder / CONFIG_FILE}: {name} is {value!r}, not a size")
    shape = DraftShape(**{name: int(value or 0) for name, value in values.items()})
    if shape.width % (2 * shape.heads) or shape.tokens > shape.vocab_size:
        raise CheckpointError(f"{folder / CONFIG_FILE}: the sizes do not fit together: {shape}")
    return shape


def _facts(config: Mapping[str, Any], folder: Path) -> DraftHeadFacts:
    try:
        accepted = tuple(float(share) for share in config.get("accepted", ()))
    except (TypeError, ValueError):
        raise CheckpointError(f"{folder / CONFIG_FILE}: accepted is no list of shares") from None
    return DraftHeadFacts(str(config.get("drafts_for", "")), str(config.get("drafts_for_digest", "")), accepted)


def _check(file: SafetensorsFile, wanted: Mapping[str, torch.Tensor], folder: Path) -> None:
    for name, tensor in wanted.items():
        if name not in file.tensors:
            raise CheckpointError(f"{folder / WEIGHTS_FILE}: has no tensor {name}")
        found, kind = tuple(file.stored(name).shape), "I64" if tensor.dtype == torch.long else "F32"
        if found != tuple(tensor.shape) or file.stored(name).dtype != kind:
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE}: {name} is {file.stored(name).dtype} of {list(found)}, the configuration says"
                f" {kind} of {list(tensor.shape)}"
            )
