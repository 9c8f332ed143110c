"""A remote model gives the same results as the whole one, for eight families here, and for all by `make
test-families`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import peerd
from peerd.compute.families.lookup import FAMILIES
from tests.compute.tiny_families import BLOCKS, tiny_model
from tests.peerd.facade.conftest import LISTEN, Servers

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.slow,
    # Warnings of Transformers about its own models.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

#: Layers that return tuples (bloom, mpt), positions without rotary embeddings (gpt2, opt), cut ones (gptj), two kinds
#: of rotary embeddings and windows (gemma3_text), latent keys and experts (deepseek_v3), chunks (llama4_text).
EIGHT = ("bloom", "deepseek_v3", "gemma3_text", "gpt2", "gptj", "llama4_text", "mpt", "opt")
WANTED = sorted(FAMILIES) if os.environ.get("PEERD_ALL_FAMILIES") else EIGHT
# Models whose whole version already gives padded rows other values than the same rows without padding.
PADDING_CHANGES_THE_WHOLE = ("llama4_text",)
PADDED = (0, 7, 13)
# Running states of a few rows take as much as thousands of such small positions.
KV_TOKENS = 32768


@dataclass(frozen=True, slots=True)
class Pair:
    """A family's tiny model, whole and remote."""

    name: str
    local: Any
    remote: Any

    def close(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=2e-3)


@pytest.fixture(scope="module", params=WANTED)
def pair(request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    family = FAMILIES[request.param]
    local = tiny_model(family).requires_grad_(False)
    path: Path = tmp_path_factory.mktemp(request.param)
    local.save_pretrained(path)
    spec = peerd.ServeSpec(path, peerd.Span(0, BLOCKS), kv_tokens=KV_TOKENS, throughput=1000.0, stay=True)
    server = peerd.open_peer(listen=[LISTEN], serve=[spec], bootstrap=servers.bootstrap)
    # Both ends wait for each other's answers while they open, so they open in parallel.
    with ThreadPoolExecutor(1) as threads:
        opening = threads.submit(servers.bridge.hold, server)
        remote: Any = peerd.RemoteModelForCausalLM.from_pretrained(path, bootstrap=servers.bootstrap)
    _, close = opening.result()
    try:
        with remote:
            for model in (local, remote):
                model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
            yield Pair(request.param, local, remote.eval())
    finally:
        close()


def tokens(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(3, 96, (rows, columns), generator=torch.Generator().manual_seed(1))


def padded(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The rows with this many columns of padding on their left."""
    mask = torch.ones_like(rows)
    for row, count in enumerate(PADDED):
        mask[row, :count] = 0
    return {"input_ids": rows * mask, "attention_mask": mask}


def positions(model: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Position ids that count real tokens, if the family's forward takes any."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def test_logits_and_hidden_states_are_the_whole_models(pair: Pair) -> None:
    ids = tokens(2, 24)
    with torch.no_grad():
        found, expected = (
            model(ids, output_hidden_states=True, use_cache=False) for model in (pair.remote, pair.local)
        )
    pair.close(found.logits, expected.logits)
    assert len(found.hidden_states) == len(expected.hidden_states)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        pair.close(ours, theirs)


def test_padded_rows_are_what_they_are_alone(pair: Pair) -> None:
    rows = tokens(3, 20)
    inputs = padded(rows)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        found = pair.remote(**inputs, **positions(pair.local, mask)).logits
        for row, count in enumerate(PADDED):
            alone = pair.local(rows[row : row + 1, count:]).logits
            pair.close(found[row : row + 1, count:], alone)


def test_greedy_answers_of_a_padded_batch_are_the_whole_models(pair: Pair) -> None:
    inputs = padded(tokens(3, 20))
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    found = pair.remote.generate(**inputs, **options)
    if pair.name not in PADDING_CHANGES_THE_WHOLE:
        assert torch.equal(found, pair.local.generate(**inputs, **options))
        return
    for row, count in enumerate(PADDED):
        alone = pair.local.generate(inputs["input_ids"][row : row + 1, count:], **options)
        assert torch.equal(found[row : row + 1, count:], alone)


def test_beams_are_the_whole_models(pair: Pair) -> None:
    ids = tokens(1, 24)
    options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    mask = torch.ones_like(ids)
    assert torch.equal(
        pair.remote.generate(ids, attention_mask=mask, **options),
        pair.local.generate(ids, attention_mask=mask, **options),
    )


def test_gradients_of_the_input_are_the_whole_models(pair: Pair) -> None:
    ids, gradients = tokens(2, 9), []
    for model in (pair.remote, pair.local):
        leaf = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=leaf, labels=ids, use_cache=False).loss.backward()
        gradients.append(leaf.grad / leaf.grad.abs().max())
    torch.testing.assert_close(*gradients, rtol=0, atol=2e-3)
