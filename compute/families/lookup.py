"""Finds the row of a family by its `model_type`, or the reason why that architecture is refused.

A row (`families/rows.py`, `families/state_rows.py`) names Transformers' own classes and where they keep their parts;
the classes are imported only when they are used. Some decoders change their input embeddings inside their forward
(Granite's multiplier, Bloom's norm, GPT-2's positions). That belongs to the head; the row names it so that a span can
leave it out. Architectures that cannot be cut are listed in `families/refused.py` with the reasons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType

from peerd.compute.errors import UnsupportedModelError
from peerd.compute.families.family import Family
from peerd.compute.families.refused import NOT_SERVED, REFUSED
from peerd.compute.families.rows import ROWS
from peerd.compute.families.state_rows import STATE_ROWS

FAMILIES: Mapping[str, Family] = MappingProxyType({row.model_type: row for row in (*ROWS, *STATE_ROWS)})


def family_named(model_type: object) -> Family:
    """The row for a config's `model_type`. Raises UnsupportedModelError, with the reason if one is known."""
    if isinstance(model_type, str):
        if family := FAMILIES.get(model_type):
            return family
        if reason := REFUSED.get(model_type):
            raise UnsupportedModelError(f"{model_type} cannot be cut into spans: {reason}")
        if reason := NOT_SERVED.get(model_type):
            raise UnsupportedModelError(f"{model_type} is not served: {reason}")
    near = get_close_matches(str(model_type), FAMILIES, n=3)
    raise UnsupportedModelError(
        f"architecture {model_type!r} is not one of those supported{_nearest(near)}; `peerd models --families` lists"
        " them, and what is refused with the reasons"
    )


def _nearest(names: Sequence[str]) -> str:
    return f" ({', '.join(names)} are called nearly so)" if names else ""
