"""The controller against simulated texts, chains and neighbours: it wins where it can, and never loses.

Times are simulated, so that each case says exactly what it compares.
"""

import random

import pytest

from peerd.client.speculation.acceptance import Acceptance, Watch
from peerd.client.speculation.controller import Controller
from peerd.client.speculation.drafts import Draft
from peerd.client.speculation.step_times import MOST_DRAFTED, StepTimes

TOKENS = 400
PLAIN_S = 0.1


def cost_of(share):
    """A step's time where a drafted position adds `share` of a plain step."""
    return lambda drafted: PLAIN_S * (1 + share * drafted)


def stair(drafted):
    """A device that pads steps to powers of two: a second position doubles half of its time."""
    return PLAIN_S * (1 + 0.5 * drafted.bit_length())


def decode(chances, cost, *, seed=0, noise=0.0, tokens=TOKENS, times=None, others=0.0):
    """Decode so many tokens; `chances(position)` says how likely a guess for it is right. Returns the seconds."""
    random_ = random.Random(seed)
    controller = Controller(times or StepTimes(), lambda: others)
    acceptance = Acceptance()
    watch = Watch(acceptance)
    truth = [random_.random() < chances(position) for position in range(tokens + MOST_DRAFTED + 1)]
    done, seconds = 0, 0.0
    while done < tokens:
        draft = Draft(tuple(int(right) for right in truth[done : done + min(MOST_DRAFTED, tokens - done - 1)]), 2)
        watch.proposed(draft, done)
        [count] = controller.choose([acceptance.likely(draft)])
        gained = 1 + next((n for n, right in enumerate(truth[done : done + count]) if not right), count)
        step_s = cost(count) * max(0.2, random_.gauss(1, noise))
        # A guess is `1` where it is right, so that the text is all ones.
        for position in range(done, done + gained):
            watch.came(1, position)
        controller.note(1, count, gained, step_s)
        done, seconds = done + gained, seconds + step_s
    return seconds


def plain(tokens=TOKENS):
    return tokens * PLAIN_S


def best_fixed(chance, cost):
    """The time by the best fixed number of guesses, known in advance (Leviathan et al., arXiv 2211.17192, eq. 1)."""
    rates = [sum(chance**place for place in range(count + 1)) / cost(count) for count in range(MOST_DRAFTED + 1)]
    return TOKENS / max(rates)


CHANCES = [0.0, 0.2, 0.5, 0.7, 0.9, 0.98]
COSTS = {"free": cost_of(0.0), "cheap": cost_of(0.02), "half": cost_of(0.5), "full": cost_of(1.0), "stair": stair}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("chance", CHANCES)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_it_never_loses(chance, cost, noise):
    seconds = [decode(lambda _: chance, COSTS[cost], seed=seed, noise=noise) for seed in range(5)]
    assert sum(seconds) / 5 <= plain() / 0.98


@pytest.mark.parametrize(("cost", "share"), [("free", 0.75), ("cheap", 0.75), ("stair", 0.65)])
@pytest.mark.parametrize("chance", [0.7, 0.9, 0.98])
def test_it_comes_near_what_foresight_would_choose(chance, cost, share):
    """Once an earlier answer has measured the chain, as all but a model's first have it.

    The rest is what caution costs: an answer begins with short drafts, and stops for a while after bad luck.
    """
    times = StepTimes()
    decode(lambda _: chance, COSTS[cost], seed=99, times=times)
    seconds = [decode(lambda _: chance, COSTS[cost], seed=seed, times=times) for seed in range(10)]
    assert sum(seconds) / 10 <= best_fixed(chance, COSTS[cost]) / share


@pytest.mark.parametrize("cost", COSTS)
def test_a_text_that_turns_from_copies_to_prose_does_not_lose(cost):
    def chances(position):
        return 0.95 if position % 100 < 50 else 0.05

    seconds = [decode(chances, COSTS[cost], seed=seed) for seed in range(5)]
    assert sum(seconds) / 5 <= plain() / 0.98


def test_a_short_answer_of_bad_guesses_loses_half_a_token_at_most():
    for seed in range(20):
        assert decode(lambda _: 0.0, cost_of(1.0), seed=seed, tokens=16) <= plain(16) + 1.6 * PLAIN_S


def test_a_chain_that_becomes_loaded_is_noticed():
    """The costs that an earlier answer measured are wrong for this one: a position now costs as much as a step."""
    times = StepTimes()
    decode(lambda _: 0.7, cost_of(0.0), times=times)
    assert decode(lambda _: 0.5, cost_of(1.0), times=times, tokens=TOKENS) <= plain() / 0.97


def test_one_step_that_hangs_does_not_end_drafting():
    hung = iter([False] * 20 + [True] + [False] * 10_000)
    seconds = decode(lambda _: 0.95, lambda drafted: 5.0 if drafted and next(hung) else PLAIN_S)
    assert seconds < plain() / 3 + 5.0


@pytest.mark.parametrize("chance", [0.9, 0.98])
def test_one_slow_first_drafted_step_does_not_end_drafting(chance):
    """A server that warms up takes three times as long for the very first step with a guess."""
    slow = iter([True])
    seconds = decode(lambda _: chance, lambda drafted: PLAIN_S * (3 if drafted and next(slow, False) else 1))
    assert seconds < plain() / 2


def test_a_load_that_has_gone_is_noticed():
    """Every size was measured while the chain was full: a guess seemed to cost three steps. Now it costs nothing."""
    times = StepTimes()
    for size in (1, 2, 4, 8, 16):
        for _ in range(20):
            times.note(size, 1 + 3.0 * size)
    assert decode(lambda _: 0.95, cost_of(0.0), times=times) < plain() / 2


def test_neighbours_wait_for_our_drafts_so_their_tokens_count():
    """Two guesses of three are right and each costs a third of a step: good for one, bad for sixteen."""
    alone = decode(lambda _: 0.67, cost_of(0.33))
    crowded = decode(lambda _: 0.67, cost_of(0.33), others=15.0)
    assert alone < 0.9 * plain()
    assert crowded == pytest.approx(plain(), rel=0.02)


def test_rows_share_the_positions_by_their_chances():
    times = StepTimes()
    for size in (1, 2, 4, 8, 16):
        times.note(size, 1 + 0.1 * size)
    controller = Controller(times)
    controller.note(2, 0, 2, PLAIN_S)
    chosen = controller.choose([[0.9, 0.8, 0.05], [0.3, 0.1]])
    assert chosen[0] == 2
    assert chosen[1] <= 1


def test_the_first_steps_and_every_so_often_one_are_plain():
    """Without them there is nothing to compare with."""
    controller = Controller(StepTimes())
    assert controller.choose([[1.0] * 8]) == [0]
    controller.note(1, 0, 1, PLAIN_S)
    counts = []
    for _ in range(200):
        [count] = controller.choose([[1.0] * MOST_DRAFTED])
        controller.note(1, count, count + 1, PLAIN_S)
        counts.append(count)
    assert 2 <= counts.count(0) <= 4
    # It feels its way up.
    assert counts[:6] == [1, 2, 4, 8, 16, 31]
