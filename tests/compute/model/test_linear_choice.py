"""Linear layers are packed if a measurement says so, and the measurement is remembered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import platformdirs
import pytest
import torch
from torch import nn

from peerd.compute.model import linear_choice
from peerd.compute.model.linear_choice import ROWS, pack_linears, packed_over_plain, pays_to_pack
from peerd.compute.model.packed_linear import PackedLinear


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(512, 300)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path))
    return tmp_path / "linear_layouts.json"


def timing_of(ratios: dict[int, float], calls: list[int] | None = None):
    """A clock on which packed layers take `ratios[rows]` of a plain layer's time."""

    def timing(layers: Sequence[nn.Module], x: torch.Tensor) -> float:
        if calls is not None:
            calls.append(len(layers))
        return ratios[len(x)] if isinstance(layers[0], PackedLinear) else 1.0

    return timing


def test_only_large_plain_fp32_layers_are_packed(linear: nn.Linear) -> None:
    class Special(nn.Linear):
        pass

    model = nn.Module()
    model.large = linear
    model.small = nn.Linear(8, 8)
    model.half = nn.Linear(512, 300, dtype=torch.bfloat16)
    model.special = Special(512, 300)
    model.kv_b_proj = nn.Linear(512, 300)
    assert pack_linears(model, lambda _: True) == 1
    assert isinstance(model.large, PackedLinear)


def test_layers_of_a_shape_that_loses_stay_plain_beside_packed_ones_of_another() -> None:
    model = nn.Sequential(nn.Linear(512, 300), nn.Linear(300, 512), nn.Linear(512, 300))
    assert pack_linears(model, lambda layers: layers[0].in_features == 512) == 2
    assert [type(layer) for layer in model] == [PackedLinear, nn.Linear, PackedLinear]


@pytest.mark.parametrize(
    ("ratios", "packed"),
    [
        ({1: 0.6, 4: 0.7, 16: 0.8}, True),
        ({1: 1.5, 4: 0.7, 16: 0.8}, False),
        ({1: 0.6, 4: 0.7, 16: 1.1}, False),
        ({1: 1.0, 4: 1.0, 16: 0.9}, True),
        ({1: 1.0, 4: 0.99, 16: 0.97}, False),
    ],
)
def test_layers_are_packed_where_none_loses_and_one_gains(
    linear: nn.Linear, ratios: dict[int, float], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_choice, "sweep_seconds", timing_of(ratios))
    assert pays_to_pack([linear]) is packed


def test_a_machine_measures_each_shape_once(linear: nn.Linear, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    calls: list[int] = []
    monkeypatch.setattr(linear_choice, "sweep_seconds", timing_of({1: 0.5, 4: 0.5, 16: 0.5}, calls))
    assert pays_to_pack([linear])
    first = len(calls)
    assert pays_to_pack([linear])
    assert len(calls) == first > 0
    assert pays_to_pack([nn.Linear(600, 300)])
    assert len(calls) == 2 * first
    assert "512x300" in cache.read_text()


def test_one_turn_that_was_disturbed_decides_nothing(linear: nn.Linear) -> None:
    turns = iter(range(1000))

    def timing(layers: Sequence[nn.Module], _: torch.Tensor) -> float:
        return (0.5 if isinstance(layers[0], PackedLinear) else 1.0) * (100 if next(turns) < 3 else 1)

    assert packed_over_plain([linear], timing) == dict.fromkeys(ROWS, 0.5)


def test_the_layers_are_really_timed(linear: nn.Linear) -> None:
    assert all(ratio > 0 for ratio in packed_over_plain([linear] * 3, linear_choice.sweep_seconds).values())
