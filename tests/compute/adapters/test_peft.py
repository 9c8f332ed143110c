"""Everything that peft leaves out of an adapter's file is left out, and everything else computes what peft computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peerd.compute.adapters.file import open_adapter
from peerd.compute.adapters.span_adapters import SpanAdapters
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import AdapterError
from peerd.compute.model.head import load_head
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span

peft = pytest.importorskip("peft")
# peft asks Transformers by an old name; and says which targets it has no weights for.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),
]
TinyCheckpoint = Callable[[str], Path]
TOKENS = torch.randint(3, 90, (20,), generator=torch.Generator().manual_seed(0))
ALL = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def base(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama")


def saved(base: Path, folder: Path, **more: Any) -> Path:
    """An adapter of queries, values and the way down, as peft saves it."""
    from transformers import AutoModelForCausalLM

    settings = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, **more})
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return folder


def edit(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def logits_of_peft(base: Path, adapter: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    with torch.no_grad():
        logits: torch.Tensor = peft.PeftModel.from_pretrained(whole, adapter).eval()(input_ids=TOKENS[None]).logits[0]
    return logits


def logits_of_spans(base: Path, adapter: Path) -> torch.Tensor:
    with open_checkpoint(base) as checkpoint, open_adapter(adapter, checkpoint.family) as file:
        head = load_head(checkpoint)
        hidden = head.embed(TOKENS)[None]
        for blocks in (Span(0, 3), Span(3, 8)):
            span = load_span(checkpoint, blocks, attention="eager")
            adapters = SpanAdapters(span)
            adapters.check_complete(file)
            adapters.load("a", file.read())
            with adapters.under("a"), torch.no_grad():
                hidden = span.forward_no_cache(hidden)
    return head.logits(hidden[0])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["model.layers.2.self_attn.q_proj", "v_proj"]},
        {"target_modules": r".*\.(q_proj|down_proj)"},
        {"exclude_modules": ["v_proj"]},
        {"exclude_modules": r".*\.layers\.[35]\..*"},
        {"layers_to_transform": [1, 4]},
        {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 3},
        {"alpha_pattern": {"v_proj": 32, r"layers\.3\.self_attn\.q_proj": 1}},
    ],
)
def test_an_adapter_is_what_peft_makes_of_its_file(base: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    adapter = saved(base, tmp_path / "adapter")
    plain = logits_of_spans(base, adapter)
    edit(adapter, **fields)
    expected = logits_of_peft(base, adapter)
    torch.testing.assert_close(logits_of_spans(base, adapter), expected, rtol=1e-4, atol=1e-4)
    assert not fields or not torch.allclose(plain, expected, atol=1e-2), "the field changes something"


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"q_proj": 8, "layers.1.self_attn.v_proj": 2}, "alpha_pattern": {"v_proj": 32}},
        {"rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 9}, "use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"down_proj": 3, "q_proj": 7}, "use_rslora": True},
    ],
    ids=["ranks and alphas", "rslora with a rank", "rslora with both"],
)
def test_ranks_and_alphas_of_single_modules_are_pefts(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = saved(base, tmp_path / "adapter", **settings)
    expected = logits_of_peft(base, adapter)
    torch.testing.assert_close(logits_of_spans(base, adapter), expected, rtol=1e-4, atol=1e-4)
    # Without the patterns peft could not even load these ranks; without the alphas the scale would be another.
    with_plain_alpha = logits_of_spans(base, saved(base, tmp_path / "plain", **{**settings, "lora_alpha": 100}))
    assert not torch.allclose(with_plain_alpha, expected, atol=1e-2)


def test_an_adapter_of_which_nothing_is_meant_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter")
    edit(adapter, target_modules=["o_proj"])
    with pytest.raises(AdapterError, match="targets none of the modules"):
        logits_of_spans(base, adapter)
