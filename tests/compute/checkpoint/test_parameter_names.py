"""Stored names become recipes for a decoder's parameters: pieces are put together in order, and none may be missing."""

from __future__ import annotations

import pytest

from peerd.compute.checkpoint.parameter_names import Recipe, recipes
from peerd.compute.errors import CheckpointError
from peerd.compute.families.lookup import FAMILIES

CONVOLUTIONS = tuple(f"model.layers.2.self_attn.{part}_conv1d.weight" for part in "qkv")


def test_rows_of_several_tensors_make_one_parameter_in_the_order_of_the_family() -> None:
    found = recipes(reversed(CONVOLUTIONS), FAMILIES["kimi_linear"], "here")
    assert found == {"layers.2.self_attn.conv1d.weight": Recipe(CONVOLUTIONS)}


def test_a_parameter_that_is_stored_whole_is_taken_as_it_is() -> None:
    whole = "model.layers.2.self_attn.conv1d.weight"
    assert recipes([whole], FAMILIES["kimi_linear"], "here") == {"layers.2.self_attn.conv1d.weight": Recipe((whole,))}


def test_a_missing_piece_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.conv1d\.weight is incomplete: .*k_conv1d"):
        recipes((CONVOLUTIONS[0], CONVOLUTIONS[2]), FAMILIES["kimi_linear"], "here")
