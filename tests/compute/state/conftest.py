"""Whole models with running states, run over long texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.families.lookup import FAMILIES
from tests.compute.engine_chain import Reference
from tests.compute.tiny_families import tiny_model

# Longer than the log of inputs of a row that promises nothing.
LONG = 240
BACK = 4


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Reference]]:
    found: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in found:
            found[name] = _reference(name, tmp_path_factory.mktemp(name))
        return found[name]

    yield get
    for reference in found.values():
        reference.checkpoint.close()


def _reference(name: str, folder: Path) -> Reference:
    model = tiny_model(FAMILIES[name])
    with torch.no_grad():
        for parameter in model.parameters():
            # Over so many positions the rounding of larger weights adds up, in Transformers too.
            parameter.mul_(0.5 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    layers = model.base_model.layers
    seen: list[torch.Tensor] = []
    layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).clone()), with_kwargs=True
    )
    layers[-1].register_forward_hook(lambda _, __, output: seen.append(output[0] if type(output) is tuple else output))
    with torch.no_grad():
        model(torch.randint(3, 96, (3, LONG), generator=torch.Generator().manual_seed(0)))
    return Reference(open_checkpoint(folder), *seen)


@pytest.fixture
def convolved(references: Callable[[str], Reference]) -> Reference:
    return references("lfm2")
