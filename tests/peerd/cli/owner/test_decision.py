"""When a server yields to the machine's owner, as a table, and how it lasts."""

from __future__ import annotations

import pytest

from peerd.cli.owner.decision import (
    CORES_SHARE,
    GPU_SHARE,
    INPUT_S,
    LOOK_S,
    LOOKS_IN_USE,
    QUIET_S,
    Serving,
    Signs,
    after,
    use_of,
)

BUSY = Signs(cores=1.0)
QUIET = Signs(cores=0.0, gpu=0.0, input_idle_s=10 * INPUT_S)


@pytest.mark.parametrize(
    ("signs", "words"),
    [
        (Signs(), ""),
        (QUIET, ""),
        (Signs(cores=CORES_SHARE), ""),
        (Signs(cores=CORES_SHARE + 0.01), "of the processor"),
        (Signs(gpu=GPU_SHARE), ""),
        (Signs(gpu=GPU_SHARE + 0.01), "of a GPU"),
        (Signs(input_idle_s=INPUT_S), ""),
        (Signs(input_idle_s=INPUT_S - 1), "keyboard"),
        (Signs(input_idle_s=0.0, cores=1.0, gpu=1.0), "keyboard"),
        (Signs(cores=0.9, gpu=0.5, input_idle_s=3600.0), "50% of a GPU"),
    ],
)
def test_signs_of_use(signs: Signs, words: str) -> None:
    assert words in use_of(signs)
    assert bool(use_of(signs)) == bool(words)


def seen(*looks: Signs, serving: Serving | None = None, every_s: float = LOOK_S) -> list[bool]:
    """Whether it serves after each look."""
    serving = serving or Serving()
    found = []
    for number, signs in enumerate(looks):
        serving = after(serving, signs, number * every_s)
        found.append(serving.may_serve)
    return found


QUIET_LOOKS = int(QUIET_S / LOOK_S)


def test_a_use_of_one_look_ends_nothing_and_one_that_lasts_does() -> None:
    assert seen(QUIET, BUSY, QUIET, BUSY) == [True] * 4
    assert seen(*[BUSY] * LOOKS_IN_USE) == [True] * (LOOKS_IN_USE - 1) + [False]


def test_it_serves_again_after_a_long_quiet_and_not_before() -> None:
    looks = [BUSY] * LOOKS_IN_USE + [QUIET] * (QUIET_LOOKS + 1)
    assert seen(*looks)[LOOKS_IN_USE - 1 :] == [False] * (QUIET_LOOKS + 1) + [True]


def test_each_use_in_a_quiet_time_begins_it_anew() -> None:
    looks = [BUSY] * LOOKS_IN_USE + [QUIET] * (QUIET_LOOKS - 1) + [BUSY] + [QUIET] * (QUIET_LOOKS + 1)
    assert seen(*looks)[LOOKS_IN_USE - 1 : -1] == [False] * (2 * QUIET_LOOKS + 1)
    assert seen(*looks)[-1]


def test_it_says_why_it_does_not_serve() -> None:
    serving = after(after(Serving(), BUSY, 0.0), Signs(input_idle_s=0.0), LOOK_S)
    assert serving.why == "somebody is at the keyboard"


def test_a_machine_that_says_nothing_serves() -> None:
    assert all(seen(*[Signs()] * 10))
