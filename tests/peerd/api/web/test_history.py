"""What the page shows of the last hour, and since when each server has been seen."""

from __future__ import annotations

import pytest
import trio

from peerd.api.web.history import SAMPLE_S, History

EPOCH = 1_800_000_000.0


def wall_clock() -> float:
    return EPOCH + trio.current_time()


async def test_a_sample_holds_the_tokens_and_the_coverage_of_its_minute() -> None:
    history = History(wall_clock)
    began = wall_clock()
    shares = iter([1.0, 0.5, 1.0, 1.0])

    async def coverage() -> dict[str, float]:
        return {"tiny": next(shares)}

    async with trio.open_nursery() as nursery:
        nursery.start_soon(history.run, coverage)
        await trio.sleep(1)
        for _ in range(3):
            history.count_token()
        await trio.sleep(2 * SAMPLE_S)
        nursery.cancel_scope.cancel()
    first, second = history.samples
    assert (first.tokens, second.tokens) == (3, 0)
    assert (first.coverage, second.coverage) == ({"tiny": 0.5}, {"tiny": 1.0})
    assert (first.at - began, second.at - began) == pytest.approx((SAMPLE_S, 2 * SAMPLE_S))


async def test_a_server_counts_from_when_it_was_first_seen_and_anew_after_a_gap() -> None:
    history = History(wall_clock)
    began = wall_clock()
    assert history.since("tiny", ["a"]) == {"a": began}
    await trio.sleep(60)
    assert history.since("tiny", ["a", "b"]) == {"a": began, "b": began + 60}
    assert history.since("other", ["a"]) == {"a": began + 60}
    await trio.sleep(60)
    assert history.since("tiny", ["b"]) == {"b": began + 60}
    await trio.sleep(60)
    assert history.since("tiny", ["a", "b"]) == {"a": began + 180, "b": began + 60}
    assert history.since("other", ["a"]) == {"a": began + 60}
