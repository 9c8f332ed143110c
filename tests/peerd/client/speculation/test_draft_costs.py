"""A draft model takes time before each step: it wins where it can, and never loses. Times are simulated."""

from __future__ import annotations

import random

import pytest
import trio

from peerd.client.speculation.confidence import grade_of
from peerd.client.speculation.controller import Controller
from peerd.client.speculation.draft_times import DraftTimes
from peerd.client.speculation.drafts import Draft
from peerd.client.speculation.speculation import Speculation
from peerd.client.speculation.step_times import StepTimes

TOKENS = 400
PLAIN_S = 0.1


class Silent:
    """An n-gram drafter that finds nothing."""

    def propose(self, text, count):
        return Draft()


class Oracle:
    """A draft model that takes `token_s` for each token. It knows the text, and errs as often as `right` says."""

    def __init__(self, truth, right, token_s, *, sure=lambda _: 0.7):
        self.times = DraftTimes()
        self.times.note(1, token_s)
        self.ready = True
        self.reading_s = 0.0
        self.asked = 0
        self.ended = 0
        self._truth = truth
        self._right = right
        self._token_s = token_s
        self._sure = sure

    def drafter(self, prompt, length):
        return self

    def end(self):
        self.ended += 1

    async def propose(self, text, ask):
        self.asked += 1
        tokens, grades, chance = [], [], 1.0
        for position in range(len(text), len(text) + ask.count):
            await trio.sleep(self._token_s)
            tokens.append(self._truth[position] if self._right[position] else -1)
            grades.append(grade_of(self._sure(self._right[position])))
            chance *= ask.shares[grades[-1]]
            if chance < ask.least:
                break
        return Draft(tuple(tokens), grades=tuple(grades))


async def decode(chance, token_s, cost, *, seed=0, noise=0.0, tokens=TOKENS, speculation=None, **options):
    """Decode so many tokens; returns the seconds, and the oracle."""
    random_ = random.Random(seed)
    truth = [random_.randrange(1000) for _ in range(tokens + 40)]
    chances = chance if callable(chance) else lambda _: chance
    right = [random_.random() < chances(position) for position in range(tokens + 40)]
    oracle = Oracle(truth, right, token_s, **options)
    shared = speculation or Speculation(Silent)
    if shared.model is not None:
        oracle.times = shared.model.times
    shared.model = oracle
    speculator = shared.answer(1)
    began = trio.current_time()
    text = truth[:1]
    with speculator.decoding(text, tokens + 1):
        while len(text) <= tokens:
            [draft], _ = await speculator.drafts([(0, text, tokens - len(text))])
            step_s = cost(len(draft)) * max(0.2, random_.gauss(1, noise))
            await trio.sleep(step_s)
            start = len(text)
            wrong = next((place for place, token in enumerate(draft) if token != truth[start + place]), len(draft))
            for position in range(start, start + wrong + 1):
                text.append(truth[position])
                speculator.came(0, truth[position], position)
            speculator.note(1, len(draft), wrong + 1, step_s)
    return trio.current_time() - began, oracle


def cost_of(share):
    return lambda drafted: PLAIN_S * (1 + share * drafted)


COSTS = {
    "free": cost_of(0.0),
    "cheap": cost_of(0.02),
    "half": cost_of(0.5),
    "stair": lambda drafted: PLAIN_S * (1 + 0.5 * drafted.bit_length()),
}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("token_s", [0.001, 0.005, 0.03, 0.1, 0.3])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.7, 0.95])
async def test_it_never_loses(chance, token_s, cost):
    total = sum([(await decode(chance, token_s, COSTS[cost], seed=seed, noise=0.1))[0] for seed in range(3)])
    assert total / 3 <= TOKENS * PLAIN_S / 0.98


async def test_it_wins_where_it_can():
    """Seven guesses of ten are right, and one costs a twentieth of a step: foresight would gain 2.35 times."""
    for seed in range(4):
        seconds, _ = await decode(0.7, 0.005, cost_of(0.0), seed=seed)
        assert seconds <= TOKENS * PLAIN_S / 1.8


async def test_a_model_that_knows_when_it_guesses_is_stopped_in_time():
    """Where its own probability tells right from wrong, it is no better to guess on behind a wrong one."""
    blind, _ = await decode(0.7, 0.01, cost_of(0.02), seed=1)
    seeing, _ = await decode(0.7, 0.01, cost_of(0.02), seed=1, sure=lambda right: 0.95 if right else 0.1)
    assert seeing < 0.95 * blind


async def test_one_that_is_too_slow_is_hardly_asked():
    _, oracle = await decode(0.9, 0.3, cost_of(0.0))
    assert oracle.asked <= 3


async def test_one_that_is_always_wrong_is_hardly_asked_and_never_again_in_the_next_answer():
    speculation = Speculation(Silent)
    _, first = await decode(0.0, 0.005, cost_of(0.0), speculation=speculation)
    _, second = await decode(0.0, 0.005, cost_of(0.0), speculation=speculation, seed=1)
    assert first.asked <= 25
    assert 5 <= second.asked <= 15


async def test_one_that_becomes_good_is_noticed():
    seconds, _ = await decode(lambda position: 0.9 if position > 100 else 0.0, 0.005, cost_of(0.0), tokens=800)
    assert seconds <= 800 * PLAIN_S / 1.8


class Known:
    """A free drafter that is always right."""

    def __init__(self, seed, tokens=TOKENS):
        random_ = random.Random(seed)
        self._truth = [random_.randrange(1000) for _ in range(tokens + 40)]

    def propose(self, text, count):
        return Draft(tuple(self._truth[len(text) :][:count]), 16)


async def test_where_guesses_are_free_and_right_the_model_is_not_asked():
    speculation = Speculation(lambda: Known(3))
    alone = Speculation(lambda: Known(3))
    seconds, oracle = await decode(0.9, 0.02, cost_of(0.01), seed=3, speculation=speculation)
    free, _ = await decode(0.0, 9.0, cost_of(0.01), seed=3, speculation=alone)
    assert oracle.asked <= 5
    assert seconds <= 1.1 * free


async def test_a_model_that_is_still_reading_is_not_asked():
    speculation = Speculation(Silent)
    oracle = Oracle([1] * 9, [True] * 9, 0.001)
    oracle.ready = False
    speculation.model = oracle
    speculator = speculation.answer(1)
    with speculator.decoding([1], 9):
        for _ in range(5):
            assert (await speculator.drafts([(0, [1], 8)]))[0] == [()]
            speculator.note(1, 0, 1, PLAIN_S)
    assert (oracle.asked, oracle.ended) == (0, 1)


async def test_answers_of_several_rows_have_no_draft_model():
    speculation = Speculation(Silent)
    oracle = speculation.model = Oracle([1] * 9, [True] * 9, 0.001)
    speculator = speculation.answer(2)
    with speculator.decoding([1], 9):
        for _ in range(5):
            assert (await speculator.drafts([(0, [1], 8), (1, [1], 8)]))[0] == [(), ()]
            speculator.note(2, 0, 2, PLAIN_S)
    assert (oracle.asked, oracle.ended) == (0, 0)


def begun():
    """A controller that has seen one plain step."""
    controller = Controller(StepTimes())
    controller.note(1, 0, 1, PLAIN_S)
    return controller


def test_the_time_of_asking_counts_against_the_budget():
    controller = begun()
    assert controller.ask([], 0.9, 0.005, 8).count == 1
    controller.note(1, 0, 1, PLAIN_S, asking_s=0.6 * PLAIN_S)
    assert controller.ask([], 0.9, 0.005, 8) is None


def test_what_a_wrong_guess_could_cost_must_be_left_in_the_budget():
    assert begun().ask([], 0.95, 0.2 * PLAIN_S, 8).count == 1
    assert begun().ask([], 0.95, 0.3 * PLAIN_S, 8) is None


def test_a_guess_that_costs_more_than_it_gains_is_asked_for_once_to_learn():
    controller = begun()
    for _ in range(4):
        controller.note(1, 1, 2, PLAIN_S)
    assert controller.ask([], 0.6, 0.9 * PLAIN_S, 8).count == 1
    assert controller.ask([], 0.6, 0.9 * PLAIN_S, 8) is None
    assert controller.ask([], 0.95, 0.1 * PLAIN_S, 8).count > 1


def test_the_time_of_a_token_is_a_mean_of_which_disturbances_count_little():
    times = DraftTimes()
    assert times.token_s is None
    times.note(4, 0.04)
    assert times.token_s == pytest.approx(0.01)
    times.note(1, 9.0)
    assert times.token_s == pytest.approx(0.02)
    for _ in range(40):
        times.note(2, 0.1)
    assert times.token_s == pytest.approx(0.05, rel=0.05)
