"""A client's head refuses what it has no embedding for, and answers many at once."""

from __future__ import annotations

import pytest
import torch
import trio
import trio.testing

from peerd.exchange.head_task import HeadTask
from peerd.protocol.errors import InvalidRequest


class TableHead:
    """Five tokens, eight positions: a token's embedding is its id and its position."""

    vocab_size = 5
    max_positions = 8
    calls = 0

    def embed(self, token_ids, positions):
        return torch.stack([token_ids, positions], dim=1).float()

    def logits(self, hidden, most=None):
        self.calls += 1
        return hidden * 2


async def test_tokens_are_embedded_from_the_position_given():
    task = HeadTask(TableHead())
    assert task.embed([1, 2]).tolist() == [[1, 0], [2, 1]]
    assert task.embed([1, 2], 6).tolist() == [[1, 6], [2, 7]]
    assert task.embed([], 8).shape == (0, 2)


@pytest.mark.parametrize(
    ("ids", "start", "reason"),
    [([5], 0, "token 5"), ([-1], 0, "token -1"), ([1, 2], 7, "positions 7 to 8"), ([1], -1, "positions -1 to -1")],
)
async def test_what_has_no_embedding_is_refused(ids, start, reason):
    with pytest.raises(InvalidRequest, match=reason):
        HeadTask(TableHead()).embed(ids, start)


@pytest.mark.real_time
async def test_requests_that_come_together_are_computed_together():
    head = TableHead()
    task = HeadTask(head)
    results = {}

    async def ask(value):
        results[value] = await task.logits(torch.full((2, 2), float(value)))

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as asking:
            for value in range(5):
                asking.start_soon(ask, value)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(task.run)
        nursery.cancel_scope.cancel()
    assert all((results[value] == 2 * value).all() for value in range(5))
    assert head.calls == 1
