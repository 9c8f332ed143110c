"""Finds what the adapters of a batch's sessions put in the place of keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peerd.compute.adapters.lora import PREFIX_K, PREFIX_V, DeepPrompt, Lora
from peerd.compute.attention.prefix import BatchPrefix, Place
from peerd.compute.steps import Segment


def prefix_of(segments: Sequence[Segment], loaded: Mapping[str, Lora], first_block: int) -> BatchPrefix | None:
    """What the adapters, by name in `loaded`, put into these segments; None if that is nothing.

    first_block: the number in the model of the span's first block.
    """
    found: dict[str, dict[int, list[Place]]] = {PREFIX_K: {}, PREFIX_V: {}}
    offset = 0
    for segment in segments:
        for (block, name), value in loaded[segment.adapter].items() if segment.adapter else ():
            if name in found and isinstance(value, DeepPrompt) and segment.start < len(value.values):
                place = offset, value.values[segment.start : segment.end]
                found[name].setdefault(block - first_block, []).append(place)
        offset += segment.count
    return BatchPrefix(found[PREFIX_K], found[PREFIX_V]) if any(found.values()) else None
