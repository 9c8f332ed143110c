"""How many of the largest logits decide a draw: an answer asks the head for no more of them."""

from __future__ import annotations

import pytest
import torch

from peerd.client.sampling import SamplingParams
from peerd.compute.model.lm_head import product
from peerd.compute.model.shortlist import Shortlist
from peerd.exchange.sampler import Sampler

PARAMS = {
    "greedy": SamplingParams(),
    "top-k": SamplingParams(temperature=0.8, top_k=50, seed=1),
    "top-k and top-p": SamplingParams(temperature=1.5, top_k=20, top_p=0.9, seed=2),
    "min-p": SamplingParams(temperature=1.0, top_k=64, min_p=0.02, seed=3),
    "not before its time": SamplingParams(min_new_tokens=4, eos_token_ids=(0, 7)),
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_the_same_tokens_are_drawn_as_from_all_logits(params: SamplingParams) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, states = torch.randn(5000, 128, generator=generator) * 0.3, torch.randn(64, 128, generator=generator)
    assert params.deciding is not None
    short = Shortlist.of(weight).logits(states, weight, None, params.deciding, product)
    exact = product(states, weight)
    sampler = Sampler(params)
    for position, (some, scores) in enumerate(zip(short, exact, strict=True)):
        drawn = [sampler.pick(each, [], row=0, position=position) for each in (some, scores)]
        assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("params", "most"),
    [
        (SamplingParams(), 1),
        (SamplingParams(temperature=1.0, top_k=40), 40),
        (SamplingParams(temperature=1.0), None),
        (SamplingParams(temperature=1.0, top_p=0.9), None),
        (SamplingParams(repetition_penalty=1.1), None),
        (SamplingParams(presence_penalty=0.5), None),
        (SamplingParams(frequency_penalty=-0.5), None),
        (SamplingParams(logit_bias=((3, 5.0),)), None),
        (SamplingParams(min_new_tokens=2, eos_token_ids=(1, 2)), 3),
    ],
)
def test_what_decides_a_draw(params: SamplingParams, most: int | None) -> None:
    assert params.deciding == most
