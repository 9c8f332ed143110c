"""Finds the row of a family by its `model_type`, or the reason why that architecture is refused.

A row (`families/rows.py`) names Transformers' own classes and where they keep their parts; the classes are imported
only when they are used. Some decoders change their input embeddings inside their forward (Granite's multiplier, Bloom's
norm, GPT-2's positions). That belongs to the head; the row names it so that a span can leave it out. Architectures that
cannot be cut are listed in `families/refused.py` with the reasons.
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
    """The row for a config's `model_type`. Raises UnsupportedModel, with the reason if one is known."""
    if isinstance(model_type, str):
        if family := FAMILIES.get(model_type):
            return family
        if reason := REFUSED.get(model_type):
            raise UnsupportedModel(f"{model_type} cannot be cut into spans: {reason}")
    raise UnsupportedModel(f"architecture {model_type!r} is not one of those supported: {', '.join(sorted(FAMILIES))}")
