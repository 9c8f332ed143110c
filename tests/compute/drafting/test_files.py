"""The files of a draft head: what was written is read again, and anything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peerd.compute.drafting.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    DraftHeadFacts,
    open_draft_folder,
    read_head,
    write_head,
)
from peerd.compute.drafting.network import DraftNetwork, DraftShape
from peerd.compute.errors import CheckpointError

FACTS = DraftHeadFacts("org/name", "ab" * 32, (0.5, 0.25))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    network = DraftNetwork(DraftShape.of_model(32, 96, 40))
    network.tokens.copy_(torch.arange(40) * 2)
    write_head(tmp_path / "head", network, FACTS)
    return tmp_path / "head"


def change(folder: Path, **fields: object) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_head_is_read_as_it_was_written(folder: Path) -> None:
    network, facts = read_head(folder)
    assert facts == FACTS
    assert network.shape == DraftShape(width=32, inner=86, heads=1, tokens=40, vocab_size=96)
    assert network.tokens.tolist() == list(range(0, 80, 2))
    again, _ = read_head(folder)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())
    with open_draft_folder(folder) as found:
        assert found == folder


def test_its_card_names_the_model_and_what_was_measured(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "base_model: org/name" in card
    assert "50%, 25%" in card


def test_a_model_is_no_head(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text('{"model_type": "llama"}')
    for path in (tmp_path, tmp_path / "nothing"):
        with open_draft_folder(path) as found:
            assert found is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": "32"}, "width is '32', not a size"),
        ({"heads": 0}, "heads is 0, not a size"),
        ({"heads": 5}, "do not fit together"),
        ({"tokens": 97}, "do not fit together"),
        ({"inner": 64}, r"gate_up.weight is F32 of \[172, 32\], the configuration says F32 of \[128, 32\]"),
        ({"vocab_size": 50}, "ids outside a vocabulary of 50"),
        ({"accepted": 3}, "accepted is no list"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folder: Path, fields: dict[str, object], message: str) -> None:
    change(folder, **fields)
    with pytest.raises(CheckpointError, match=message):
        read_head(folder)


def test_a_head_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=WEIGHTS_FILE):
        read_head(folder)
