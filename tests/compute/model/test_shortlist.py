"""A shortlist of a large vocabulary gives exactly the best logits, or all of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peerd.compute.families.lookup import family_named
from peerd.compute.families.meta_build import build_on_meta, compute_buffers
from peerd.compute.model import shortlist as shortlists
from peerd.compute.model.head import Head
from peerd.compute.model.lm_head import LmHead, product
from peerd.compute.model.shortlist import SHORTLIST, Shortlist, most_positions

VOCABULARY, WIDTH = 5001, 128


def weights(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(VOCABULARY, WIDTH, generator=generator)
    rows[::7] *= 8  # few tokens have much larger rows, as in trained models
    rows[5] = 0
    return rows.to(dtype)


def hidden(positions: int = 6, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(positions, WIDTH, generator=torch.Generator().manual_seed(4)) * scale


class Counting:
    """The exact product, and how many positions asked for all of the vocabulary."""

    def __init__(self) -> None:
        self.whole = 0

    def __call__(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.whole += len(rows) * (len(weight) == VOCABULARY)
        return product(rows, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_no_logit_is_above_its_bound(dtype: torch.dtype, scale: float) -> None:
    weight, states = weights(dtype), hidden(32, scale)
    exact = states.double() @ weight.double().T
    assert (exact <= Shortlist.of(weight).upper_bounds(states).double()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("most", [1, 50])
def test_the_best_are_exact_and_the_others_exact_or_excluded(dtype: torch.dtype, with_bias: bool, most: int) -> None:
    weight, states, counting = weights(dtype), hidden(), Counting()
    bias = torch.linspace(-3, 3, VOCABULARY) if with_bias else None
    logits = Shortlist.of(weight).logits(states, weight, bias, most, counting)
    exact = product(states, weight) + (0 if bias is None else bias)
    assert counting.whole == 0, "proven without the whole product"
    best = exact.topk(most)
    assert torch.equal(logits.topk(most).indices, best.indices)
    listed = logits.isfinite()
    assert listed.sum(1).tolist() == [SHORTLIST] * len(states)
    torch.testing.assert_close(logits[listed], exact[listed], rtol=1e-5, atol=1e-4)


def test_where_nothing_stands_out_all_logits_are_computed() -> None:
    """Of equal logits the lowest token wins, wherever it stands."""
    weight, counting = torch.ones(VOCABULARY, WIDTH), Counting()
    logits = Shortlist.of(weight).logits(hidden(), weight, None, 1, counting)
    assert counting.whole == len(logits)
    assert logits.isfinite().all()
    assert logits.argmax(1).tolist() == product(hidden(), weight).argmax(1).tolist()


def test_only_the_positions_that_are_not_proven_are_computed_again() -> None:
    weight, counting, states = weights(), Counting(), hidden(3)
    states[1] = 0
    logits = Shortlist.of(weight).logits(states, weight, None, 1, counting)
    assert counting.whole == 1
    assert logits.isfinite().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_hidden_states_that_are_not_finite_stay_visible(broken: float) -> None:
    weight, states = weights(), hidden(1)
    states[0, 3] = broken
    logits = Shortlist.of(weight).logits(states, weight, None, 1, product)
    assert not logits[0, logits[0].argmax()].isfinite()


def test_the_error_of_a_row_whose_gain_is_rounded_counts() -> None:
    """A gain that bf16 rounds down lets the largest weight leave int8's range."""
    weight = torch.zeros(VOCABULARY, WIDTH)
    weight[:, 0] = torch.linspace(1.0, 2.0, VOCABULARY)
    made = Shortlist.of(weight)
    again = made.quantized.float() * made.gains.float()[:, None]
    torch.testing.assert_close((weight - again).norm(dim=1), made.errors)


@pytest.fixture
def gaining(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that gains by shortlists of up to four positions."""
    monkeypatch.setattr("peerd.compute.model.lm_head.most_positions", lambda _weight, _product: 4)


@pytest.mark.usefixtures("gaining")
def test_a_head_uses_its_shortlist_where_only_the_best_are_wanted() -> None:
    layer = nn.Linear(WIDTH, VOCABULARY, bias=False)
    layer.weight = nn.Parameter(weights(), requires_grad=False)
    head = LmHead(layer)
    head.make_shortlist()
    assert head(hidden(2)).isfinite().all()
    with head.only_best(1):
        assert not head(hidden(2)).isfinite().all()
        assert head(hidden(5)).isfinite().all(), "more positions than pay"
    with head.only_best(SHORTLIST + 1):
        assert head(hidden(2)).isfinite().all()
    assert head(hidden(2)).isfinite().all()


@pytest.mark.usefixtures("gaining")
def test_a_family_that_caps_its_logits_keeps_the_best() -> None:
    from transformers.models.gemma2 import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, final_logit_softcapping=5.0)
    model = build_on_meta(Gemma2ForCausalLM, config, torch.float32)
    model.model.layers = nn.ModuleList()
    model.to_empty(device="cpu").requires_grad_(False)
    model.lm_head.weight = nn.Parameter(weights(), requires_grad=False)
    model.model.norm.weight.fill_(0)
    compute_buffers(model, model.config, torch.device("cpu"))
    head = Head(model, family_named("gemma2"))
    exact = head.logits(hidden(3))
    head.make_shortlist()
    short = head.logits(hidden(3), 10)
    assert not torch.equal(short, exact)
    torch.testing.assert_close(short.topk(10).values, exact.topk(10).values)


@pytest.mark.parametrize("width", [33, 96, 100])
def test_widths_that_the_product_would_read_beyond_get_none(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(shortlists, "_SMALLEST", 0)
    weight = torch.zeros(VOCABULARY, width)
    assert most_positions(weight, product) == 0
    with pytest.raises(ValueError, match=f"width of {width}"):
        Shortlist.of(weight)


def test_small_heads_and_those_on_other_devices_get_none() -> None:
    assert most_positions(weights(), product) == 0
    assert most_positions(torch.empty(200_000, 64, device="meta"), product) == 0


def test_a_cpu_whose_product_errs_more_than_it_may_goes_without(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda _name: str(tmp_path))
    monkeypatch.setattr(shortlists, "_SMALLEST", 0)

    def wrong(x: torch.Tensor, quantized: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        return torch.full((len(x), len(quantized)), -1000.0, dtype=torch.bfloat16)

    monkeypatch.setattr(torch, "_weight_int8pack_mm", wrong)
    assert most_positions(weights(), product) == 0


def test_what_was_measured_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda _name: str(tmp_path))
    monkeypatch.setattr(shortlists, "_SMALLEST", 0)
    ratios = {1: 0.2, 4: 0.5, 16: 1.4}
    asked: list[int] = []

    def ratio(_shortlist: Shortlist, _weight: torch.Tensor, rows: int, _product: object) -> float:
        asked.append(rows)
        return ratios[rows]

    monkeypatch.setattr(shortlists, "_ratio", ratio)
    assert [most_positions(weights(), product) for _ in range(2)] == [4, 4]
    assert asked == [1, 4, 16]
