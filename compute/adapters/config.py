"""Reads peft's `adapter_config.json`, as far as its fields change the result.

Takes a decoded JSON object and returns a checked value. The file comes from an untrusted source, so every field's
type is checked, and a field that we neither run nor know to be harmless is refused by name: a result that is nearly
that of the trained adapter would be worse than none. Patterns are regular expressions, and one could be written so
that matching never ends: such patterns are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peerd.compute.errors import AdapterError

# A rank is at most a layer's width; no known model is wider.
MAX_RANK = 1 << 16
_MAX_PATTERNS = 4096
_MAX_PATTERN_CHARS = 512
# With this many repeats, none inside another, matching a name of a hundred characters takes milliseconds at worst.
_MAX_REPEATS = 2
# A repeated group, and nested sets, of which Python warns.
_SUSPECT = re.compile(r"\)[*+{]|\[\^?\[|--|&&|~~|\|\|")

# How training started and went, or how weights are merged: the trained numbers are in the other file.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "parent_library",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
_READ = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)
# Other initialisations change the model's own weights too, which no other peer has.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_REASONS: Mapping[str, str] = {
    "use_dora": "DoRA rescales whole weights",
    "modules_to_save": "whole modules that were trained are not LoRA; peft runs them, on a remote model's own head",
    "trainable_token_indices": "embeddings are the client's, not a block's",
    "target_parameters": "experts and other bare parameters are not adapted",
    "layer_replication": "the model would have other blocks",
    "alora_invocation_tokens": "it begins in the middle of a text",
    "lora_bias": "biases are not adapted",
}


@dataclass(frozen=True, slots=True)
class Modules:
    """Which modules a field means, by their full names in the whole model: those of `pattern`, or ends in `names`."""

    names: tuple[str, ...] = ()
    pattern: str | None = None

    def has(self, module: str) -> bool:
        if self.pattern is not None:
            return re.fullmatch(self.pattern, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in self.names)


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """A LoRA adapter's settings.

    `targets`: ends of the adapted modules' names; None where the file says it by a regular expression or
    `all-linear`, and the stored tensors alone tell. `layers`: the blocks it is limited to; None for all. `chosen` and
    `excluded`: what peft asks of each stored module, and takes out again.
    """

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: tuple[str, ...] | None
    layers: tuple[int, ...] | None
    chosen: Modules | None = None
    excluded: Modules | None = None

    def rank_of(self, module: str) -> int:
        """The rank for a module, given by its full name in the whole model."""
        return self.rank_pattern.get(_pattern_for(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """The factor for the product of a module's matrices."""
        alpha = self.alpha_pattern.get(_pattern_for(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def leaves_out(self, module: str, block: int) -> bool:
        """Whether peft would leave this module of a block as it is, although matrices are stored for it."""
        if self.excluded is not None and self.excluded.has(module):
            return True
        if self.chosen is not None and not self.chosen.has(module):
            return True
        return self.layers is not None and block not in self.layers

    def targets_module(self, module: str, block: int) -> bool:
        """Whether the list of targets names this module; False if there is no list."""
        if self.targets is None or (self.layers is not None and block not in self.layers):
            return False
        return any(module == target or module.endswith(f".{target}") for target in self.targets)


def parse_config(fields: Any, where: object) -> LoraConfig:
    """Check the decoded JSON. Raises AdapterError naming the field."""
    if type(fields) is not dict:
        raise AdapterError(f"{where}: it is not a JSON object")
    if fields.get("peft_type") != "LORA":
        raise AdapterError(f"{where}: peft_type is {_shown(fields.get('peft_type'))}; only LORA is run")
    _refuse_what_we_do_not_run(fields, where)
    reader = _Fields(fields, where)
    targets = reader.targets()
    return LoraConfig(
        rank=reader.rank("r", fields.get("r", 8)),
        alpha=reader.number("lora_alpha", fields.get("lora_alpha", 8)),
        rslora=bool(fields.get("use_rslora")),
        rank_pattern={key: reader.rank("rank_pattern", value) for key, value in reader.patterns("rank_pattern")},
        alpha_pattern={key: reader.number("alpha_pattern", value) for key, value in reader.patterns("alpha_pattern")},
        targets=targets,
        layers=reader.layers() if targets is not None else None,
        chosen=reader.modules("target_modules"),
        excluded=reader.modules("exclude_modules"),
    )


def _refuse_what_we_do_not_run(fields: Mapping[str, Any], where: object) -> None:
    for name, value in fields.items():
        if name in _HARMLESS or name in _READ or not value:
            continue
        reason = _REASONS.get(name)
        raise AdapterError(f"{where}: {_shown(name)} = {_shown(value)} is not run{': ' + reason if reason else ''}")
    if fields.get("bias") not in (None, "none"):
        raise AdapterError(f"{where}: bias = {_shown(fields['bias'])} is not run: biases are not adapted")
    start = fields.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        raise AdapterError(
            f"{where}: init_lora_weights = {_shown(start)} is not run: it changes the model's own weights; save the"
            " adapter converted to plain LoRA"
        )


class _Fields:
    """Reads fields that may be absent and whose types are checked."""

    def __init__(self, fields: Mapping[str, Any], where: object) -> None:
        self._fields = fields
        self._where = where

    def rank(self, name: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            raise self._wrong(name, value, f"a rank is from 1 to {MAX_RANK}")
        return value

    def number(self, name: str, value: Any) -> float:
        # A whole number of a thousand digits does not fit a float.
        if type(value) not in (int, float) or not abs(value) < 1e9:
            raise self._wrong(name, value, "a finite number is meant")
        return float(value)

    def patterns(self, name: str) -> list[tuple[str, Any]]:
        found = self._fields.get(name) or {}
        if type(found) is not dict or len(found) > _MAX_PATTERNS:
            raise self._wrong(name, found, "an object of patterns is meant")
        for pattern in found:
            if not _ends_soon(pattern):
                raise self._wrong(name, pattern, "this pattern is malformed, or could take forever to match")
        return list(found.items())

    def targets(self) -> tuple[str, ...] | None:
        found = self._fields.get("target_modules")
        # peft removes names again, by a list or a pattern: then, too, only the stored tensors tell.
        if type(found) is str or (self._fields.get("exclude_modules") and type(found) is list):
            return None
        if type(found) is not list or not found or not all(type(name) is str for name in found):
            raise self._wrong("target_modules", found, "names, a pattern or all-linear are meant")
        # If the model's block list has an unusual name, peft's rule for block numbers is a pattern.
        if self._fields.get("layers_to_transform") is not None and self._fields.get("layers_pattern"):
            return None
        return tuple(found)

    def modules(self, name: str) -> Modules | None:
        """The meaning of a list or a pattern; None if the file has neither, or if only the tensors show the meaning.

        A pattern whose matching could take for ever is not evaluated, and neither is `all-linear`, which means all
        stored layers.
        """
        found = self._fields.get(name)
        if type(found) is str and found != "all-linear" and _ends_soon(found):
            return Modules(pattern=found)
        if type(found) is list and found and all(type(each) is str for each in found):
            return Modules(names=tuple(found))
        return None

    def layers(self) -> tuple[int, ...] | None:
        found = self._fields.get("layers_to_transform")
        if found is None or found == []:
            return None
        numbers = [found] if type(found) is int else found
        if type(numbers) is not list or not all(type(number) is int and number >= 0 for number in numbers):
            raise self._wrong("layers_to_transform", found, "blocks' numbers are meant")
        return tuple(numbers)

    def _wrong(self, name: str, value: Any, wanted: str) -> AdapterError:
        return AdapterError(f"{self._where}: {name}: {_shown(value)}: {wanted}")


def _pattern_for(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that matches the end of the module's name; the name itself if none does."""
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return module


def _ends_soon(pattern: str) -> bool:
    """Whether matching takes polynomial time of a low degree, judging by the pattern's text."""
    repeats = sum(pattern.count(sign) for sign in "*+{")
    if len(pattern) > _MAX_PATTERN_CHARS or repeats > _MAX_REPEATS or _SUSPECT.search(pattern):
        return False
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
