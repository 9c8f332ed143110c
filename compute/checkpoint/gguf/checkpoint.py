"""Opens a GGUF file as a checkpoint: reads its configuration and the names of its tensors.

Tensors are read by Transformers' own processors, or by ours where it has none. If a tensor of a block has no place in
the model, the file holds another model than we would compute: it is refused, and the error names the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.gguf.architectures import Architecture, architecture_of
from peerd.compute.checkpoint.gguf.config import config_of
from peerd.compute.checkpoint.gguf.split import GgufFiles
from peerd.compute.checkpoint.gguf.weights import GgufWeights
from peerd.compute.errors import UnsupportedModelError
from peerd.compute.families.family import Family
from peerd.compute.families.lookup import family_named
from peerd.compute.families.meta_build import build_on_meta
from peerd.compute.transformers_compat import gguf_reader

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from peerd.compute.checkpoint.hub_folder import HubFolder

# llama.cpp computes these frequencies itself; old files still store them, one copy a block.
_REDUNDANT = re.compile(r"blk\.\d+\.(attn_rot_embd|attn\.rotary_emb)\b.*")


def open_gguf(path: Path, folder: HubFolder | None = None, *, hub_id: str = "", commit: str = "") -> Checkpoint:
    """Open a GGUF file, or the first of several parts: one of this machine, or one of a hub's `folder`, which the
    checkpoint then owns. Reads headers only. Raises CheckpointError or UnsupportedModelError.
    """
    file = GgufFiles(path, folder)
    try:
        architecture = architecture_of(file.metadata, path)
        family = family_named(architecture.model_type)
        config, fields = config_of(file, architecture, family)
        weights = _weights(file, architecture, family, config, fields)
    except BaseException:
        file.close()
        raise
    # No published configuration goes into the model digest: the weights file itself holds the configuration.
    return Checkpoint(
        path,
        family,
        config,
        weights,
        name=file.name,
        published_config={},
        hub_id=hub_id,
        commit=commit,
        disk_bytes=None if folder is None else folder.room_bytes(),
        gguf_metadata=file.metadata_alone,
    )


def _weights(
    file: GgufFiles, architecture: Architecture, family: Family, config: PreTrainedConfig, fields: Mapping[str, Any]
) -> GgufWeights:
    processor = _processor(architecture)(config=dict(fields))
    names = _parameter_names(family, config, architecture.name, processor)
    if (adapt := getattr(processor, "adapt_names", None)) is not None:
        names = adapt(names, file.tensors)
    sources: dict[str, list[str]] = {}
    for stored, parameter in names.items():
        # A parameter whose name does not end in `.weight`, such as fused experts, is stored under a name that does.
        whole_name = stored in file.tensors or stored.endswith((".weight", ".bias"))
        sources.setdefault(parameter, []).append(stored if whole_name else f"{stored}.weight")
    found = {name: tuple(stored) for name, stored in sources.items() if not file.tensors.keys().isdisjoint(stored)}
    placed = {stored for tensors in found.values() for stored in tensors}
    guessing = _only_guessing(file, architecture, config)
    for stored in file.tensors:
        in_block = stored.startswith("blk.") and not stored.startswith(guessing)
        if in_block and stored not in placed and not _REDUNDANT.fullmatch(stored):
            raise UnsupportedModelError(f"{file.path}: tensor {stored} has no place in a {family.model_type}")
    return GgufWeights(file, found, names, processor)


def _only_guessing(file: GgufFiles, architecture: Architecture, config: PreTrainedConfig) -> tuple[str, ...]:
    """How the names of tensors begin that belong to blocks which only guess further tokens (MTP), behind all others."""
    guessing = file.metadata.get(f"{architecture.name}.nextn_predict_layers")
    count = guessing if type(guessing) is int else 0
    return tuple(f"blk.{config.num_hidden_layers + block}." for block in range(count))


def _processor(architecture: Architecture) -> Any:
    from peerd.compute.checkpoint.gguf import processors

    name = architecture.processor or architecture.name
    reader = gguf_reader()
    return processors.OURS.get(architecture.model_type) or reader.TENSOR_PROCESSORS.get(name, reader.TensorProcessor)


def _parameter_names(family: Family, config: PreTrainedConfig, architecture: str, processor: Any) -> dict[str, str]:
    """GGUF's name -> the parameter, for every parameter that the model has.

    Transformers has this as `get_gguf_hf_weights_map`, which takes seconds for 30 blocks.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next((key for key, value in MODEL_ARCH_NAMES.items() if value == architecture), None)
    if arch is None:
        raise UnsupportedModelError(
            f"the installed package gguf does not know the architecture {architecture}: install a newer"
        )
    known = get_tensor_name_map(arch, config.num_hidden_layers)
    model = build_on_meta(family.causal_type(), config, torch.float32)
    # Of some classes the base model is the causal model itself.
    base = model.base_model_prefix if hasattr(model, model.base_model_prefix) else ""
    prefix = "".join(f"{part}." for part in (base, family.decoder_at) if part)
    names: dict[str, str] = {}
    for full_name in map(processor.preprocess_name, model.state_dict()):
        stem, dot, suffix = full_name.rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, dot, suffix = full_name, "", ""
        # Some files were converted from the base model, whose names have no prefix.
        gguf_name = known.get_name(stem) or known.get_name(stem.removeprefix(prefix))
        if gguf_name is not None:
            names[f"{gguf_name}{dot}{suffix}"] = full_name
        else:
            processor.perform_fallback_tensor_mapping(names, f"{dot}{suffix}", "", full_name)
    return {stored: name.removeprefix(prefix) for stored, name in names.items()}
