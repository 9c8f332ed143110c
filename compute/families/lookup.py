"""Which architectures can be cut into spans, and the little that each needs beyond the common rule.

A row (`family_rows.py`) names Transformers' own classes and where they keep their parts; the classes are
imported only when used. What a decoder does to its input embeddings inside its forward (Granite's multiplier,
Bloom's norm, GPT-2's positions) belongs to the head, and is named here so that a span can leave it out. What
cannot be cut is refused with its reason (`refused_families.py`). Knows no tensors and no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from peerd.compute.errors import UnsupportedModel
from peerd.compute.families.family import Family
from peerd.compute.families.refused import REFUSED
from peerd.compute.families.rows import ROWS

FAMILIES: Mapping[str, Family] = MappingProxyType({row.model_type: row for row in ROWS})


def family_named(model_type: object) -> Family:
    """The row for a config's `model_type`. Raises UnsupportedModel, with the reason where there is a known one."""
    if isinstance(model_type, str):
        if family := FAMILIES.get(model_type):
            return family
        if reason := REFUSED.get(model_type):
            raise UnsupportedModel(f"{model_type} cannot be cut into spans: {reason}")
    raise UnsupportedModel(f"architecture {model_type!r} is not one of those supported: {', '.join(sorted(FAMILIES))}")
