"""A real model: the tokens of `generate()` are the whole model's, up to the first that rounding may decide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import peerd
from peerd.compute.checkpoint.demo_model import demo_model_path
from tests.peerd.facade.conftest import Servers

pytestmark = [pytest.mark.real_time, pytest.mark.model, pytest.mark.slow]

# Two choices whose logits differ by less may change places, because the same sum was rounded in another order.
DECISIVE = 0.05
GREEDY = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    path = demo_model_path()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, padding_side="left")


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Any, Any]]:
    """The remote model, whose blocks two servers have, and the whole one."""
    path = demo_model_path()
    local = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    servers = Servers()
    try:
        servers.serve(path, (0, 15), (15, 30), dtype="float32")
        with peerd.RemoteModelForCausalLM.from_pretrained(path, bootstrap=servers.bootstrap, dtype="float32") as model:
            yield model.eval(), local
    finally:
        servers.close()


CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "greedy": (["The capital of France is"], {}),
    "a padded batch": (["Once upon a time there was", "Bees", "The three primary colours are red,"], {}),
    "guidance, a second cache": (["The capital of France is"], {"guidance_scale": 1.5}),
    "early exit as assistant": (["The capital of France is"], {"assistant_early_exit": 10}),
    "prompt lookup": (["one two three one two three one two three one two"], {"prompt_lookup_num_tokens": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_decisive_tokens_are_the_whole_models(case: str, pair: tuple[Any, Any], tokenizer: Any) -> None:
    texts, options = CASES[case]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    found, expected = (model.generate(**inputs, **GREEDY, **options) for model in pair)
    start = inputs["input_ids"].shape[1]
    compared = 0
    for row in range(len(texts)):
        for step in range(min(found.sequences.shape[1], expected.sequences.shape[1]) - start):
            first, second = expected.scores[step][row].topk(2).values.tolist()
            if first - second < DECISIVE:
                break
            assert found.sequences[row, start + step] == expected.sequences[row, start + step], (row, step)
            compared += 1
    assert compared > 6 * len(texts), "hardly a token was decisive"


def test_beams_find_answers_that_are_as_likely_as_the_whole_models(pair: tuple[Any, Any], tokenizer: Any) -> None:
    inputs = tokenizer(["The capital of France is", "Bees"], return_tensors="pt", padding=True)
    options = {**GREEDY, "num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 8}
    found, expected = (model.generate(**inputs, **options) for model in pair)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=0, atol=DECISIVE / 8)
    for row in (0, 2):
        best, second = expected.sequences_scores[row : row + 2].tolist()
        if best - second > DECISIVE:
            assert torch.equal(found.sequences[row], expected.sequences[row])
