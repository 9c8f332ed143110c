"""Sketches are as far apart as what they were made from, and whoever lacks their seed cannot make others alike."""

import pytest
import torch

from peerd.compute.audits.distance import distance
from peerd.compute.audits.sketches import SLACK, Sketcher, are_same, signs, sketched_limit
from peerd.protocol.messages.audits import SKETCH_SIZE

WIDTH = 256
SEED = bytes(range(16))


@pytest.fixture
def states():
    """Inputs and what honest blocks made of them, with a few channels that are far larger, as models have them."""
    generator = torch.Generator().manual_seed(1)
    inputs, added = torch.randn(2, 96, WIDTH, generator=generator)
    inputs[:, 7] += 300
    return inputs, inputs + added


def test_signs_follow_from_the_seed_alone():
    assert signs(SEED, 8).flatten().tolist()[:16] == [1, -1, -1, -1, 1, -1, -1, -1, 1, -1, 1, -1, -1, 1, -1, 1]
    assert set(signs(SEED, WIDTH).unique().tolist()) == {-1, 1}
    assert not torch.equal(signs(SEED, WIDTH), signs(SEED[::-1], WIDTH))


@pytest.mark.parametrize("error", [0.01, 0.1, 1.0])
def test_the_distance_of_sketches_is_that_of_what_they_were_made_from(states, error):
    inputs, outputs = states
    other = outputs + error * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
    true = distance(inputs, outputs, other)
    for number in range(50):
        sketch = Sketcher((bytes([number] * 16),), WIDTH).sketch
        seen = distance(sketch(inputs), sketch(outputs), sketch(other))
        assert true / SLACK < seen < SLACK * true


def test_two_seeds_give_both_sketches_side_by_side(states):
    inputs, _ = states
    both = Sketcher((SEED, SEED[::-1]), WIDTH).sketch(inputs)
    assert both.shape == (96, 2 * SKETCH_SIZE)
    assert torch.allclose(both[:, :SKETCH_SIZE], Sketcher((SEED,), WIDTH).sketch(inputs), rtol=1e-4, atol=1e-3)


def test_sketches_of_the_same_values_are_the_same_however_they_were_added_up(states):
    inputs, outputs = states
    sketch = Sketcher((SEED,), WIDTH).sketch
    one_by_one = torch.cat([sketch(row[None]) for row in inputs])
    assert are_same(sketch(inputs), one_by_one)
    assert not are_same(sketch(inputs), sketch(outputs))
    changed = inputs.clone()
    changed[50] *= 1.01
    assert not are_same(sketch(inputs), sketch(changed))


def test_values_so_large_that_their_sums_overflow_give_finite_sketches():
    sketched = Sketcher((SEED,), WIDTH).sketch(torch.full((2, WIDTH), 3e38))
    assert sketched.isfinite().all()


def test_no_limit_lets_a_result_pass_that_has_nothing_to_do_with_the_right_one(states):
    inputs, outputs = states
    unrelated = inputs + torch.randn(inputs.shape, generator=torch.Generator().manual_seed(5))
    sketch = Sketcher((SEED,), WIDTH).sketch
    for wrong in (inputs, unrelated):
        assert distance(sketch(inputs), sketch(wrong), sketch(outputs)) > sketched_limit(5.0)
    assert sketched_limit(0.1) == pytest.approx(0.1 * SLACK)
