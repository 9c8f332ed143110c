"""Which architectures cannot be served, and why: what `family_named` answers for them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "gemma3n": "its blocks share KV caches and take per-layer inputs",
        "gemma3n_text": "its blocks share KV caches and take per-layer inputs",
        "gemma4": "its blocks share KV caches and take per-layer inputs",
        "gemma4_text": "its blocks share KV caches and take per-layer inputs",
        "zamba": "its blocks share one attention block and take the embeddings again",
        "zamba2": "its blocks share one attention block and take the embeddings again",
    }
)
