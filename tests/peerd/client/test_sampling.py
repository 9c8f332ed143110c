from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from peerd.client.sampling import DEFAULT_MAX_NEW_TOKENS, DEFAULT_TOP_K, SamplingParams
from peerd.exchange.sampler import Sampler, draw
from peerd.protocol.errors import BadResult

VOCABULARY = 40
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def logits_of(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


def generated(model: LlamaForCausalLM, params: SamplingParams) -> list[int]:
    sampler, ids = Sampler(params), list(PROMPT)
    for _ in range(params.max_new_tokens):
        ids.append(sampler.pick(logits_of(model, ids), ids, row=0, position=len(ids)))
    return ids[len(PROMPT) :]


def random_logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def picks(params: SamplingParams, logits: torch.Tensor, count: int) -> list[int]:
    sampler = Sampler(params)
    return [sampler.pick(logits, PROMPT, row=0, position=position) for position in range(count)]


# As Transformers does it.


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_answers_are_those_of_transformers(model: LlamaForCausalLM, penalty: float) -> None:
    reference = model.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=24, repetition_penalty=penalty, pad_token_id=0
    )
    ours = generated(model, SamplingParams(max_new_tokens=24, repetition_penalty=penalty))
    assert ours == reference[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.5, "top_k": 0, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 2, "top_k": 10 * VOCABULARY, "min_p": 0.1, "repetition_penalty": 2},
    ],
    ids=str,
)
def test_sampling_weighs_tokens_as_transformers_does(model: LlamaForCausalLM, options: dict[str, Any]) -> None:
    as_floats = {name: value if name == "top_k" else float(value) for name, value in options.items()}
    reference = model.generate(
        torch.tensor([PROMPT]),
        do_sample=True,
        max_new_tokens=1,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        **as_floats,
    )
    ours = Sampler(SamplingParams(**options)).scores(logits_of(model, PROMPT), PROMPT)
    torch.testing.assert_close(ours, reference.scores[0][0], rtol=1e-5, atol=1e-5)


def test_scoring_leaves_the_logits_as_they_were() -> None:
    logits = random_logits()
    before = logits.clone()
    Sampler(SamplingParams(temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=2.0)).scores(logits, PROMPT)
    assert torch.equal(logits, before)


def test_of_equal_logits_greedy_takes_the_one_that_argmax_takes() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0])
    assert Sampler(SamplingParams()).pick(logits, [], row=0, position=0) == int(logits.argmax()) == 1


# Draws.


def test_draws_follow_the_weights() -> None:
    logits = random_logits()
    params = SamplingParams(temperature=1.0, top_k=8, seed=1)
    count = 4000
    weights = Sampler(params).scores(logits, PROMPT).double().softmax(dim=-1)
    seen = torch.bincount(torch.tensor(picks(params, logits, count)), minlength=VOCABULARY)
    assert not seen[weights == 0].any()
    expected = weights[weights > 0] * count
    chi_square = float(((seen[weights > 0] - expected) ** 2 / expected).sum())
    # Seven degrees of freedom: chance exceeds 24.3 once in a thousand seeds, and this seed is fixed.
    assert chi_square < 24.3


def test_a_replay_draws_the_same_whatever_was_drawn_before() -> None:
    logits, params = random_logits(), SamplingParams(temperature=1.0, seed=5)
    straight = picks(params, logits, 30)
    torch.manual_seed(99)
    again = Sampler(params)
    assert [again.pick(logits, PROMPT, row=0, position=place) for place in reversed(range(30))] == straight[::-1]


def test_a_draw_is_fixed_for_all_time() -> None:
    assert draw(0, 0, 0) == 0.3319386257127065
    assert draw(-7, 3, 2**40) == 0.2370719458489583


@pytest.mark.parametrize("other", [(2, 0, 0), (1, 1, 0), (1, 0, 1), (-1, 0, 0)])
def test_seed_row_and_position_each_change_the_draw(other: tuple[int, int, int]) -> None:
    assert draw(1, 0, 0) != draw(*other)


def test_draws_are_even_over_their_range() -> None:
    tenths = [math.floor(draw(3, row, position) * 10) for row in range(10) for position in range(500)]
    counts = [tenths.count(tenth) for tenth in range(10)]
    assert sum(counts) == 5000
    assert all(abs(count - 500) < 100 for count in counts)


def test_an_excluded_token_is_never_drawn() -> None:
    logits = torch.full((VOCABULARY,), -math.inf)
    logits[[0, 17]] = 0.0
    assert set(picks(SamplingParams(temperature=1.0), logits, 200)) == {0, 17}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_pick_nothing(temperature: float, value: float) -> None:
    logits = random_logits()
    logits[4] = value
    with pytest.raises(BadResult, match="position 12 are not finite"):
        Sampler(SamplingParams(temperature=temperature)).pick(logits, PROMPT, row=0, position=12)


def test_half_precision_logits_are_widened() -> None:
    logits = random_logits().bfloat16()
    params = SamplingParams(temperature=0.7, top_k=10)
    assert picks(params, logits, 20) == picks(params, logits.float(), 20)


# Choices and their defaults.


def test_a_model_that_says_nothing_is_greedy() -> None:
    params = SamplingParams.from_config(GenerationConfig(), seed=0)
    assert params == SamplingParams(top_k=DEFAULT_TOP_K, max_new_tokens=DEFAULT_MAX_NEW_TOKENS)


def test_a_model_that_samples_brings_its_own_settings() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, eos_token_id=[7, 9])
    params = SamplingParams.from_config(config)
    assert (params.temperature, params.top_k, params.top_p, params.eos_token_ids) == (0.6, 20, 0.95, (7, 9))


def test_a_model_that_samples_without_a_temperature_has_one() -> None:
    assert SamplingParams.from_config(GenerationConfig(do_sample=True)).temperature == 1.0


def test_the_caller_s_choices_win_even_where_they_are_zero() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, eos_token_id=7, max_new_tokens=5)
    params = SamplingParams.from_config(config, temperature=0, top_k=0, eos_token_ids=(), max_new_tokens=9, seed=3)
    assert params == SamplingParams(temperature=0, top_k=0, max_new_tokens=9, seed=3)


def test_a_temperature_makes_a_greedy_model_sample() -> None:
    params = SamplingParams.from_config(GenerationConfig(), temperature=1.0)
    assert len(set(picks(params, torch.zeros(VOCABULARY), 50))) > 5


def test_without_a_seed_each_answer_has_its_own() -> None:
    config = GenerationConfig()
    assert SamplingParams.from_config(config).seed != SamplingParams.from_config(config).seed


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, True, "1"]),
        ("top_k", [-1, 1.5, True]),
        ("top_p", [0, 1.1, -0.5, math.nan]),
        ("min_p", [-0.1, 1.01]),
        ("repetition_penalty", [0, -1, math.inf]),
        ("seed", [2**63, -(2**63), 0.5, False]),
        ("max_new_tokens", [0, -5, 2.0]),
        ("eos_token_ids", [(-1,), (1.0,), ("a",)]),
    ],
)
def test_a_choice_out_of_range_is_named(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=name):
            SamplingParams(**{name: value})
