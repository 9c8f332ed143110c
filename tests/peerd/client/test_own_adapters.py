"""A client's own adapter is read by the same rules as served ones, however its directory is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from peerd.client.blocks import ModelFacts, ServedBlocks
from peerd.client.session.opener import Terms
from peerd.compute.adapters.linear_layers import linear_layers
from peerd.compute.adapters.lora import BlockModule
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import AdapterError
from peerd.compute.families.layer_kinds import layer_kinds
from peerd.compute.model.head import load_head_model
from peerd.protocol.rows import SessionSize
from peerd.protocol.span import Span

BLOCKS = Span(0, 8)


@pytest.fixture
def adaptable(tiny_llama: Path) -> frozenset[BlockModule]:
    with open_checkpoint(tiny_llama) as checkpoint:
        return frozenset(linear_layers(load_head_model(checkpoint).layers, layer_kinds(checkpoint.config)))


@pytest.fixture
def model(adaptable: frozenset[BlockModule]) -> ServedBlocks:
    """Blocks that a client knows and no peer serves: for what adapters do before anything is sent."""
    facts = ModelFacts("tiny", bytes(32), 8, 32, 64, "float32", "llama", adaptable=adaptable)
    nobody: Any = SimpleNamespace(connections=None)
    return ServedBlocks(facts, nobody, nobody, nobody)


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def write(**fields: object) -> Path:
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | fields
        (tmp_path / "own").mkdir()
        (tmp_path / "own/adapter_config.json").write_text(json.dumps(config))
        name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
        shapes = {"A": (2, 32), "B": (32, 2)}
        tensors = {name.format(block, side): torch.ones(shape) for block in range(8) for side, shape in shapes.items()}
        save_file(tensors, tmp_path / "own/adapter_model.safetensors")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        return tmp_path / "own"

    return write


TERMS = Terms(bytes(32), SessionSize(64), 4, "float32", "exact", 2000)


@pytest.mark.parametrize("spelling", ["./own", "own/", "~/own", "absolute", "path"])
async def test_a_text_with_a_slash_is_a_directory_as_a_path_is(
    model: ServedBlocks, adapter: Callable[..., Path], spelling: str
) -> None:
    path = adapter()
    given = {"absolute": str(path), "path": path}.get(spelling, spelling)
    terms = await model._with_adapter(TERMS, given, BLOCKS)
    assert terms.adapter == ""
    assert terms.own_adapter is not None
    assert {module for _, module in terms.own_adapter} == {"self_attn.q_proj"}


async def test_a_directory_is_no_adapter_of_a_training_pass(model: ServedBlocks) -> None:
    with pytest.raises(AdapterError, match=r"\./own is an adapter of your own, and a training pass runs under"):
        await model.forward(torch.zeros(1, 4, 32), adapter="./own")


async def test_a_module_that_is_named_and_not_stored_is_refused_as_in_served_adapters(
    model: ServedBlocks, adapter: Callable[..., Path]
) -> None:
    path = adapter(target_modules=["q_proj", "o_proj"])
    with pytest.raises(AdapterError, match=r"it names self_attn\.o_proj of block 0 as adapted, and has no weights"):
        await model.read_adapter(path)
    # What the model does not have, such as another family's module, is no matter.
    path.joinpath("adapter_config.json").write_text(
        path.joinpath("adapter_config.json").read_text().replace("o_proj", "w1")
    )
    await model.read_adapter(path)


async def test_an_adapter_that_was_saved_beside_another_model_is_refused_unless_the_program_allows_it(
    model: ServedBlocks, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    own = await model.read_adapter(adapter())
    await model.save_adapter(own, tmp_path / "saved")
    assert (await model.read_adapter(tmp_path / "saved")).weights.keys() == own.weights.keys()
    other = replace(model.facts, digest=b"other" + bytes(27))
    nobody: Any = SimpleNamespace(connections=None)
    blocks = ServedBlocks(other, nobody, nobody, nobody)
    refused = r"saved was trained for another model, tiny \(digest 0000000000000000, .*\): .* any_base=True"
    with pytest.raises(AdapterError, match=refused):
        await blocks.read_adapter(tmp_path / "saved")
    with pytest.raises(AdapterError, match=refused):
        await blocks._with_adapter(TERMS, tmp_path / "saved", BLOCKS)
    allowed = await blocks.read_adapter(tmp_path / "saved", any_base=True)
    assert allowed.weights.keys() == own.weights.keys()


def test_what_can_be_adapted_is_every_linear_layer_of_a_block(adaptable: frozenset[BlockModule]) -> None:
    assert {block for block, _ in adaptable} == set(range(8))
    names = {name for block, name in adaptable if block == 3}
    attention, feed_forward = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    assert names == {f"self_attn.{name}" for name in attention} | {f"mlp.{name}" for name in feed_forward}
