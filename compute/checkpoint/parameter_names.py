"""Maps the names of a checkpoint's tensors to the parameters of a decoder.

Three things differ between the two: the publisher's prefix, names that Transformers has changed since, and parameters
that checkpoints store in pieces: experts one by one, and the convolutions of queries, keys and values. Takes strings
and returns recipes; reads no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from peerd.compute.errors import CheckpointError
from peerd.compute.families.family import Family

LM_HEAD = "lm_head.weight"
LM_HEAD_BIAS = "lm_head.bias"

# Where publishers put the decoder inside the whole model; the most specific prefix comes first.
PREFIXES = (
    "language_model.model.",
    "model.language_model.",
    "model.text_model.",
    "model.decoder.",
    "decoder.",
    "transformer.",
    "gpt_neox.",
    "model.",
    "",
)
# Publishers' names of the LM head, beside the family's own. `embed_out` is GPT-NeoX's name until Transformers 5.
_HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The stored tensors that make one parameter.

    If `parts` is 0, the parameter is the tensor `names[0]`, or the rows of all `names` together. Otherwise `names`
    lists, expert by expert, the `parts` tensors whose rows together are that expert's slice of a parameter [experts,
    rows, columns].
    """

    names: tuple[str, ...]
    parts: int = 0


def recipes(stored_names: Iterable[str], family: Family, where: object) -> dict[str, Recipe]:
    """Each decoder parameter (and `lm_head.weight`, `lm_head.bias`) that these tensors hold.

    Parameters have the decoder's own names, such as `layers.7.mlp.down_proj.weight`. Tensors outside the decoder are
    left out. Raises CheckpointError, which names the file or folder `where`, if there are no blocks or a piece is
    missing.
    """
    stored_names = tuple(stored_names)
    prefix = _prefix(stored_names, family, where)
    heads = _head_names(prefix, family)
    found: dict[str, Recipe] = {}
    pieces: dict[str, dict[tuple[int, int], str]] = {}
    joined: dict[str, dict[int, str]] = {}
    for stored in stored_names:
        name = heads.get(stored) or _decoder_name(stored, prefix, family)
        if name is None:
            continue
        piece = _piece(name, family)
        if piece is None:
            found[name] = Recipe((stored,))
        elif piece.expert is None:
            joined.setdefault(piece.whole, {})[piece.part] = stored
        else:
            pieces.setdefault(piece.whole, {})[piece.expert, piece.part] = stored
    for whole, parts in pieces.items():
        found[whole] = _assemble(whole, parts, where)
    for whole, stored_parts in joined.items():
        found[whole] = _join(whole, stored_parts, family, where)
    return found


def _prefix(stored_names: tuple[str, ...], family: Family, where: object) -> str:
    for prefix in (*family.stored_under, *PREFIXES):
        starts = (f"{prefix}{family.layers}.", f"{prefix}{family.stored_layers or family.layers}.")
        if any(name.startswith(starts) for name in stored_names):
            return prefix
    raise CheckpointError(f"{where}: holds no {family.model_type} blocks: no tensor is called {family.layers}.N")


def _head_names(prefix: str, family: Family) -> dict[str, str]:
    """Stored name -> `lm_head.weight` or `lm_head.bias`, for a head beside the decoder or anywhere above it.

    Heads in other places are left out: some models also store heads for speech, for drafts or for several tokens ahead.
    """
    above = [""]
    for part in prefix.split(".")[:-1]:
        above.append(f"{above[-1]}{part}.")
    leaves = {"weight": LM_HEAD, "bias": LM_HEAD_BIAS}
    heads = (family.lm_head, *_HEADS)
    return {f"{place}{head}.{leaf}": name for place in above for head in heads for leaf, name in leaves.items()}


def _decoder_name(stored: str, prefix: str, family: Family) -> str | None:
    if not stored.startswith(prefix):
        return None
    name = stored.removeprefix(prefix)
    for old, new in family.renamed:
        name = name.replace(old, new)
    return name


class _Piece(NamedTuple):
    """One piece of the parameter `whole`: of an expert, if there is one set of pieces for each."""

    whole: str
    expert: int | None
    part: int


def _piece(name: str, family: Family) -> _Piece | None:
    for fused in family.fused:
        for part, pattern in enumerate(fused.parts):
            expert_pattern = re.escape(pattern).replace(r"\{expert\}", r"(?P<expert>\d{1,5})")
            match = re.fullmatch(rf"(?P<block>{re.escape(family.layers)}\.\d{{1,5}}\.){expert_pattern}", name)
            if match is not None:
                expert = match.groupdict().get("expert")
                return _Piece(f"{match['block']}{fused.parameter}", None if expert is None else int(expert), part)
    return None


def _join(whole: str, found: Mapping[int, str], family: Family, where: object) -> Recipe:
    parts = next(fused.parts for fused in family.fused if whole.endswith(f".{fused.parameter}"))
    if missing := [part for number, part in enumerate(parts) if number not in found]:
        raise CheckpointError(f"{where}: tensor {whole} is incomplete: {missing[0]} is missing")
    return Recipe(tuple(found[number] for number in range(len(parts))))


def _assemble(whole: str, found: Mapping[tuple[int, int], str], where: object) -> Recipe:
    experts = 1 + max(expert for expert, _ in found)
    parts = 1 + max(part for _, part in found)
    wanted = [(expert, part) for expert in range(experts) for part in range(parts)]
    if missing := [key for key in wanted if key not in found]:
        raise CheckpointError(f"{where}: tensor {whole} is incomplete: expert {missing[0][0]} is missing")
    return Recipe(tuple(found[key] for key in wanted), parts)
