"""Reads and loads the LoRA adapters that a server is to serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peerd.compute.adapters.file import AdapterFile, open_adapter
from peerd.compute.adapters.lora import Lora
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.compute.engine.engine import BaseEngine, Engine
from peerd.compute.errors import AdapterError
from peerd.compute.families.family import Family
from peerd.protocol.messages.adapters import adapter_id, check_name, name_of
from peerd.protocol.span import Span


@dataclass(frozen=True, slots=True, eq=False)
class ReadAdapter:
    """An adapter's weights for a span, on the CPU, with the id under which they are served."""

    id: str
    file: AdapterFile
    weights: Lora


def read_adapter(
    name: str,
    path: str | Path,
    family: Family,
    span: Span,
    hub: HubSettings | None = None,
    *,
    model_digest: bytes | None,
) -> ReadAdapter:
    """Read what a span needs of an adapter: a directory's, or, fetched as `hub` says, one's on the hub. Blocks.

    model_digest: the model's; None takes adapters of other models too. Raises AdapterError.
    """
    try:
        check_name(name)
    except ValueError as error:
        raise AdapterError(str(error)) from None
    with open_adapter(path, family, hub) as file:
        if model_digest is not None:
            file.check_base(model_digest)
        return ReadAdapter(adapter_id(name, file.digest), file, file.read(span))


def load_adapter(engine: BaseEngine, adapter: ReadAdapter) -> None:
    """Load the adapter into the engine. Device thread. Raises AdapterError."""
    if not isinstance(engine, Engine):
        raise AdapterError(f"llama.cpp computes blocks {engine.span}, and runs no adapters: use --engine torch")
    name = name_of(adapter.id)
    if name in {name_of(other) for other in engine.adapters}:
        raise AdapterError(f"there is an adapter called {name} already: give {adapter.file.path} another name")
    engine.load_adapter_file(adapter.id, adapter.file, adapter.weights)
