"""Writes an adapter as peft does, so that peft and peerd read it again: see `file.py` for the format."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerd.compute.adapters.base import METADATA_DIGEST, TrainedFor
from peerd.compute.adapters.lora import LoraAdapter, LoraPair
from peerd.compute.adapters.source import CONFIG_FILE, WEIGHTS_FILE
from peerd.compute.errors import AdapterError

if TYPE_CHECKING:
    from peerd.compute.families.family import Family


def write_adapter(folder: Path, adapter: LoraAdapter, family: Family, base: TrainedFor) -> None:
    """Write an adapter for a model of `family` into a folder, which is made if it is missing.

    base: the model, for those who read the adapter; its name is a hub id or a path. Raises AdapterError for deep
    prompts and prefixes, which the format does not have, and if the files cannot be written.
    """
    from safetensors.torch import save_file

    pairs: dict[str, LoraPair] = {}
    root = _root(family)
    for (block, name), pair in adapter.weights.items():
        if not isinstance(pair, LoraPair):
            raise AdapterError(
                f"block {block} has a {name}, which peft's format for LoRA does not hold: save LoRA alone"
            )
        pairs[f"{root}.{block}.{name}"] = pair
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = pair.b.contiguous()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt", METADATA_DIGEST: base.digest})
        (folder / CONFIG_FILE).write_text(json.dumps(_config(pairs, base.name), indent=2) + "\n")
    except OSError as error:
        raise AdapterError(f"{folder} cannot be written: {error.strerror}") from error


def _root(family: Family) -> str:
    """The name of the list of blocks in the family's whole causal model."""
    parts = (family.causal_type().base_model_prefix, family.decoder_at, family.layers)
    return ".".join(part for part in parts if part)


def _config(pairs: dict[str, LoraPair], base: str) -> dict[str, Any]:
    """peft's configuration. The commonest rank and alpha stand for all; patterns name the modules with others."""
    ranks = {module: pair.rank for module, pair in pairs.items()}
    # peft divides alpha by the rank.
    alphas = {module: pair.scale * pair.rank for module, pair in pairs.items()}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(pairs),
        "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
        "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
    }
