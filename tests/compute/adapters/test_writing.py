"""What is written, peft and peerd both read as the same adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peerd.compute.adapters.base import TrainedFor
from peerd.compute.adapters.file import open_adapter
from peerd.compute.adapters.lora import PROMPT, DeepPrompt, LoraAdapter, LoraPair
from peerd.compute.adapters.writing import write_adapter
from peerd.compute.errors import AdapterError
from peerd.compute.families.lookup import FAMILIES
from tests.compute.tiny_families import tiny_model

BASE = TrainedFor("org/name", "ab" * 32)
#: An ordinary decoder, one inside another module, and one whose linear layers are transposed.
MODULES = {
    "llama": ("model.layers", "self_attn.q_proj", "mlp.down_proj"),
    "opt": ("model.decoder.layers", "self_attn.q_proj", "fc2"),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
}


def adapter_for(family: str, model: Any) -> LoraAdapter:
    """Two modules of blocks 1 and 6, with other ranks and scales."""
    root, *names = MODULES[family]
    weights = {}
    for block in (1, 6):
        for name, rank, scale in zip(names, (2, 3), (1.5, 0.25), strict=True):
            weight = model.get_submodule(f"{root}.{block}.{name}").weight
            out, wide = reversed(weight.shape) if family == "gpt2" else weight.shape
            weights[block, name] = LoraPair(torch.randn(rank, wide), torch.randn(out, rank), scale)
    return LoraAdapter(weights)


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_and_peerd_read_what_was_written(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(FAMILIES[family])
    adapter = adapter_for(family, model)
    write_adapter(tmp_path, adapter, FAMILIES[family], BASE)
    with open_adapter(tmp_path, FAMILIES[family]) as file:
        found = file.read()
        assert file.base == BASE
        file.check_complete(adapter.weights)
    assert found.keys() == adapter.weights.keys()
    adapted = peft.PeftModel.from_pretrained(model, tmp_path)
    assert adapted.peft_config["default"].base_model_name_or_path == "org/name"
    for (block, name), pair in adapter.weights.items():
        assert isinstance(pair, LoraPair)
        ours = found[block, name]
        assert torch.equal(ours.a, pair.a)
        assert torch.equal(ours.b, pair.b)
        layer = adapted.base_model.model.get_submodule(f"{MODULES[family][0]}.{block}.{name}")
        assert torch.equal(layer.lora_A["default"].weight, pair.a)
        assert torch.equal(layer.lora_B["default"].weight, pair.b)
        assert ours.scale == layer.scaling["default"] == pytest.approx(pair.scale)
    adapted_layers = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted_layers) == len(adapter.weights)


def test_what_the_format_does_not_hold_is_refused(tmp_path: Path) -> None:
    prompt = LoraAdapter({(0, PROMPT): DeepPrompt(torch.ones(2, 32))})
    with pytest.raises(AdapterError, match="block 0 has a prompt, which peft's format for LoRA does not hold"):
        write_adapter(tmp_path / "prompt", prompt, FAMILIES["llama"], BASE)
    assert not (tmp_path / "prompt").exists()
    (tmp_path / "file").touch()
    lora = LoraAdapter({(0, "self_attn.q_proj"): LoraPair(torch.ones(1, 32), torch.ones(32, 1), 1.0)})
    with pytest.raises(AdapterError, match="cannot be written"):
        write_adapter(tmp_path / "file", lora, FAMILIES["llama"], BASE)
