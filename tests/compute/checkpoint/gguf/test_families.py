"""Each architecture of GGUF computes what the model that was written computes, and what Transformers reads of it."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.gguf.architectures import ARCHITECTURES
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import CheckpointError
from peerd.compute.model.head import load_head
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span
from tests.compute.gguf_models import TINY, tiny_config, tiny_model
from tests.compute.gguf_writer import metadata_of, write_gguf, write_model

#: Transformers reads these files wrong, or not at all.
OURS = {"falcon_grouped", "falcon_11b", "gemma", "gpt_oss", "granite", "mixtral", "smollm3"}
OURS |= {"cohere", "cohere2", "deepseek_v2", "deepseek_v2_grouped", "deepseek_v3", "exaone4", "exaone4_windows"}
OURS |= {"glm4", "glm4_moe", "lfm2", "lfm2_moe", "llama4", "llama4_scout", "mistral3", "ministral3", "olmo2", "olmo3"}
IDS = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(0))


def logits_of(checkpoint: Checkpoint, ids: torch.Tensor = IDS) -> torch.Tensor:
    head = load_head(checkpoint)
    hidden = head.embed(ids)[None]
    with torch.no_grad():
        for span in (Span(0, 3), Span(3, 7), Span(7, 8)):
            hidden = load_span(checkpoint, span).forward_no_cache(hidden)
    return head.logits(hidden[0])


def read_by_transformers(path: Path, config: Any) -> Any:
    """The whole file's tensors as Transformers reads them, in a model of our configuration."""
    from types import SimpleNamespace

    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from peerd.compute.families.lookup import family_named

    model: Any = family_named(config.model_type).causal_type()(config).eval()
    # Transformers asks every submodule for its names too, which takes seconds and adds the base model's alone.
    base = SimpleNamespace(config=config, state_dict=model.base_model.state_dict, named_children=list)
    children = [(model.base_model_prefix, base)]
    names: Any = SimpleNamespace(config=config, state_dict=model.state_dict, named_children=lambda: children)
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=names)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_model_written_as_gguf_comes_back_with_the_same_logits(tmp_path: Path, name: str) -> None:
    architecture = TINY[name][0]
    model = tiny_model(tiny_config(name))
    path = tmp_path / "tiny.gguf"
    write_model(path, architecture, model)
    with torch.no_grad(), open_checkpoint(path) as checkpoint:
        logits = logits_of(checkpoint)
        expected = model(IDS[None]).logits[0]
        assert expected.std() > 0.05, "a model whose logits are all alike would prove nothing"
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        if name not in OURS:
            whole = read_by_transformers(path, checkpoint.config)
            torch.testing.assert_close(logits, whole(IDS[None]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_what_from_pretrained_makes_of_the_whole_file_gives_the_same_logits(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    write_model(tmp_path / "tiny.gguf", TINY[name][0], tiny_model(tiny_config(name)))
    with torch.no_grad(), open_checkpoint(tmp_path / "tiny.gguf") as checkpoint:
        whole: Any = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="tiny.gguf", config=checkpoint.config, dtype=torch.float32
        )
        torch.testing.assert_close(logits_of(checkpoint), whole(IDS[None]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bloom", "falcon", "gpt2", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_output_matrix_is_the_lm_head_where_there_is_one(tmp_path: Path, name: str, tied: bool) -> None:
    """For Bloom and Falcon too, whose files hold one although theirs is the embedding, often in finer quantization."""
    config = tiny_config(name)
    config.tie_word_embeddings = tied
    model = tiny_model(config)
    write_model(tmp_path / "tiny.gguf", TINY[name][0], model)
    with torch.no_grad(), open_checkpoint(tmp_path / "tiny.gguf") as checkpoint:
        head = load_head(checkpoint)
        assert (head.model.lm_head.weight is head.embedding_weight) == tied
        torch.testing.assert_close(logits_of(checkpoint), model(IDS[None]).logits[0], atol=1e-4, rtol=1e-4)


ODD = [0, 2, 7, 2**32 - 1, -1.0, 0.0, math.nan, math.inf, "", "linear", "yarn", "longrope", True, False, [1, 2], ["a"]]
KEYS = ["block_count", "embedding_length", "attention.head_count", "attention.head_count_kv", "attention.key_length"]
KEYS += ["rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"]
KEYS += ["context_length", "vocab_size", "expert_count", "attention.causal", "attention.sliding_window"]


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(["llama", "gemma3_linear", "gpt_oss", "stablelm", "falcon", "phi3", "qwen2_yarn", "nemotron"]),
    changes=st.dictionaries(st.sampled_from(KEYS), st.sampled_from(ODD), min_size=1, max_size=2),
)
def test_metadata_of_strangers_are_taken_or_refused(tmp_path_factory: Any, name: str, changes: dict[str, Any]) -> None:
    architecture = TINY[name][0]
    path = tmp_path_factory.getbasetemp() / "odd.gguf"
    metadata = {**metadata_of(architecture, tiny_config(name)), "block_count": 1, **changes}
    write_gguf(path, architecture, metadata, {"token_embd.weight": np.zeros((96, 32))})
    with contextlib.suppress(CheckpointError):
        open_checkpoint(path).close()


def test_every_architecture_of_the_table_has_a_tiny_model() -> None:
    assert {architecture for architecture, _, _ in TINY.values()} == set(ARCHITECTURES)
