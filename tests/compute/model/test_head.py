"""The head embeds and projects as the whole model does, and holds nothing more than that takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import CheckpointError
from peerd.compute.model.head import Head, load_head

TinyCheckpoint = Callable[[str], Path]


def head_of(path: Path, dtype: torch.dtype | None = None) -> Head:
    with open_checkpoint(path) as checkpoint:
        return load_head(checkpoint, dtype=dtype)


def parameters_of(head: Head) -> dict[str, torch.Tensor]:
    return dict(head.model.named_parameters())


def test_ids_become_what_the_first_block_is_given(tiny_checkpoint: TinyCheckpoint, tiny_name: str) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny_checkpoint(tiny_name)
    ids = torch.arange(3, 20)
    given: list[torch.Tensor] = []
    whole: Any = AutoModelForCausalLM.from_pretrained(path).eval()
    with open_checkpoint(path) as checkpoint:
        family = checkpoint.family
    decoder = getattr(whole.base_model, family.decoder_at) if family.decoder_at else whole.base_model
    first_block = getattr(decoder, family.layers)[0]
    first_block.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    with torch.no_grad():
        whole(ids[None])
    torch.testing.assert_close(head_of(path).embed(ids), given[0][0], atol=1e-6, rtol=1e-6)


def test_logits_of_a_position_do_not_depend_on_what_else_is_asked(tiny_checkpoint: TinyCheckpoint) -> None:
    head = head_of(tiny_checkpoint("gemma2"))
    hidden = torch.randn(50, head.hidden_size, generator=torch.Generator().manual_seed(0))
    together = head.logits(hidden)
    assert together.shape == (50, head.vocab_size)
    alone = torch.cat([head.logits(row[None]) for row in hidden])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert together.abs().max() <= 3, "capped as the family does"


def test_a_tied_embedding_is_held_once(tiny_checkpoint: TinyCheckpoint) -> None:
    tied, untied = (parameters_of(head_of(tiny_checkpoint(name))) for name in ("llama_tied", "llama"))
    assert set(tied) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert set(untied) == {*tied, "lm_head.weight"}


def save_changed(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with its tensors changed."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("stored_name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_tied_lm_head_that_is_stored_too_is_still_held_once(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, stored_name: str
) -> None:
    path = save_changed(
        tiny_checkpoint("llama_tied"),
        tmp_path / "both",
        lambda tensors: tensors.update({stored_name: tensors["model.embed_tokens.weight"]}),
    )
    head = head_of(path)
    assert set(parameters_of(head)) == {"model.embed_tokens.weight", "model.norm.weight"}
    hidden = torch.randn(3, head.hidden_size)
    assert torch.equal(head.logits(hidden), head_of(tiny_checkpoint("llama_tied")).logits(hidden))


def test_a_stored_lm_head_is_used_where_the_configuration_wrongly_ties_it(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    def store_another(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = -2 * tensors["model.embed_tokens.weight"]

    path = save_changed(tiny_checkpoint("llama_tied"), tmp_path / "both", store_another)
    whole: Any = AutoModelForCausalLM.from_pretrained(path).eval()
    hidden = torch.randn(3, whole.config.hidden_size)
    with torch.no_grad():
        expected = whole.lm_head(whole.model.norm(hidden))
    torch.testing.assert_close(head_of(path).logits(hidden), expected)


def test_a_configuration_that_does_not_say_whether_it_ties_is_read_as_its_family_does(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Gemma ties unless told otherwise, Llama does not."""
    for name, ties in (("gemma2", True), ("llama", False)):
        path = save_changed(tiny_checkpoint(name), tmp_path / name, lambda tensors: None)
        config = json.loads((path / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (path / "config.json").write_text(json.dumps(config))
        assert ("lm_head.weight" not in parameters_of(head_of(path))) == ties


def test_a_head_in_another_dtype_gives_fp32_logits(tiny_checkpoint: TinyCheckpoint) -> None:
    head = head_of(tiny_checkpoint("llama"), torch.bfloat16)
    embedded = head.embed(torch.tensor([3, 4]))
    assert embedded.dtype == torch.bfloat16
    assert head.logits(embedded).dtype == torch.float32


def test_no_tokens_give_no_hidden_states(tiny_checkpoint: TinyCheckpoint) -> None:
    head = head_of(tiny_checkpoint("llama"))
    assert head.embed(torch.empty(0, dtype=torch.int64)).shape == (0, head.hidden_size)


def test_a_missing_part_of_the_head_is_named(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    path = save_changed(tiny_checkpoint("llama"), tmp_path / "less", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        head_of(path)


@pytest.mark.model
def test_loading_the_real_head_takes_little_more_memory_than_the_head() -> None:
    script = """
import resource, transformers.models.llama.modeling_llama, transformers.modeling_gguf_pytorch_utils, gguf, trio
from peerd.compute.checkpoint import demo_model, opening
from peerd.compute.checkpoint.gguf import checkpoint as gguf_checkpoint
from peerd.compute.model import head
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
with opening.open_checkpoint(demo_model.demo_model_path()) as opened:
    loaded = head.load_head(opened)
loaded.logits(loaded.embed(__import__('torch').tensor([1, 2, 3])))
print(peak() - before, loaded.embedding_weight.nbytes / 2**20)
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    grown_mib, head_mib = map(float, output.split())
    assert grown_mib < head_mib + 100
