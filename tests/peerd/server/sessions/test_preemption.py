"""A pool that promised more than it has: who gives pages up, and that answers stay the same."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
import torch
import trio

from peerd.client.finding.finder import Patience
from peerd.protocol.errors import Evicted, StreamReset
from peerd.protocol.span import Span
from peerd.server.sessions.evictions import LENT_S, SHORT_S
from peerd.testing.fake_engine import fake_forward
from tests.fakes.rude_clients import answer, next_answer, send, tokens

PAGE = 16


async def begun(swarm, host, pages, caller=None, **fields):
    """A session whose first step took so many pages, and what it is called by."""
    caller = caller or await swarm.caller()
    stream = await caller.open(host, prompt_length=1, **fields)
    assert isinstance(await answer(caller, stream, tokens(PAGE * pages)), torch.Tensor)
    return caller, stream


async def test_answers_are_the_same_when_the_pool_runs_out_again_and_again(open_swarm):
    async with open_swarm() as swarm:
        hosts = [await swarm.serve(0, 4, kv_tokens=12 * PAGE) for _ in range(2)]
        failovers = []

        async def generate(seed):
            row = tokens(6 * PAGE, seed)
            client = await swarm.client()
            session = await client.session(
                Span(0, 4), max_length=6 * PAGE, max_rollback=0, prompt_length=1, patience=Patience(math.inf)
            )
            for start in range(0, len(row), 4):
                result = await session.step(row[start : start + 4], want="all")
                assert torch.equal(result, fake_forward(row[: start + 4], Span(0, 4))[start:])
            failovers.append(session.failovers + session.reopened)
            session.close()

        async with trio.open_nursery() as nursery:
            for seed in range(8):
                nursery.start_soon(generate, seed)
        assert sum(failovers) > 0
        await trio.sleep(1)
        assert [host.task.engine.free_tokens for host in hosts] == [12 * PAGE] * 2


async def test_a_session_that_grows_takes_the_pages_of_the_youngest_unused_one(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, kv_tokens=10 * PAGE)
        rested = [(await begun(swarm, host, 2, max_length=8 * PAGE))[1] for _ in range(2)]
        await trio.sleep(LENT_S)
        grows, stream = await begun(swarm, host, 1, max_length=8 * PAGE)
        began = trio.current_time()
        await answer(grows, stream, tokens(6 * PAGE), 2, start=PAGE)
        assert trio.current_time() - began < SHORT_S
        assert isinstance(await next_answer(rested[1]), Evicted)
        assert host.server.sessions == 2


async def test_a_session_in_use_waits_for_no_younger_one_and_evicts_no_older_one(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, kv_tokens=8 * PAGE)
        elder, elders = await begun(swarm, host, 2, max_length=8 * PAGE)
        younger, youngers = await begun(swarm, host, 2, max_length=8 * PAGE)
        await answer(elder, elders, tokens(2 * PAGE), 2, start=2 * PAGE)
        await answer(younger, youngers, tokens(2 * PAGE), 2, start=2 * PAGE)
        # The younger one waits, however long, as long as the older one is in use.
        await send(youngers, tokens(1), 3, start=4 * PAGE)
        for seq in range(3, 3 + 10):
            await answer(elder, elders, tokens(1), seq, start=4 * PAGE - 1)
            await trio.sleep(4)
        assert host.task.engine.short
        assert host.server.sessions == 2
        await answer(elder, elders, tokens(1), 13, start=4 * PAGE)
        assert isinstance(await next_answer(youngers), Evicted)


async def test_who_holds_most_of_the_pool_in_several_sessions_gives_of_them_to_a_newcomer(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, kv_tokens=12 * PAGE)
        hoarder = await swarm.caller()
        hoard = []
        for number in range(3):
            fields = {"session": bytes([number]) * 16, "max_length": 8 * PAGE}
            hoard.append((await begun(swarm, host, 2 if number else 1, hoarder, **fields))[1])
        _, stream = await begun(swarm, host, 1, max_length=8 * PAGE)
        await answer(hoarder, hoard[0], tokens(6 * PAGE), 2, start=PAGE)
        await send(stream, tokens(2 * PAGE), 2, start=PAGE)
        for seq in range(3, 6):
            for each, pages in zip(hoard, (7, 2, 2), strict=True):
                await send(each, tokens(1), seq, start=pages * PAGE - 1)
            await trio.sleep(SHORT_S / 2)
        with trio.fail_after(1):
            assert isinstance(await next_answer(stream), torch.Tensor)
        assert host.server.sessions == 3


@pytest.mark.parametrize("networks", ["one", "many"])
async def test_strangers_who_come_later_and_grow_take_nothing_from_a_session_in_use(open_swarm, networks):
    async with open_swarm() as swarm:
        swarm.ips = "8.8.8.{}" if networks == "one" else "8.8.{}.1"
        host = await swarm.serve(0, 4, kv_tokens=16 * PAGE)
        honest, kept = await begun(swarm, host, 3, max_length=16 * PAGE)
        strangers = [await begun(swarm, host, 1, max_length=16 * PAGE) for _ in range(4)]
        for seq in range(2, 12):
            for _, stream in strangers:
                with suppress(StreamReset, trio.ClosedResourceError):
                    await send(stream, tokens(PAGE), seq, start=PAGE * (seq - 1))
            row = await answer(honest, kept, tokens(1), seq, start=3 * PAGE - 1)
            assert isinstance(row, torch.Tensor)
            await trio.sleep(SHORT_S)
        assert isinstance(await answer(honest, kept, tokens(PAGE), 12, start=3 * PAGE), torch.Tensor)


async def test_a_client_alone_whose_younger_session_waits_for_the_older_one_loses_neither(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, kv_tokens=8 * PAGE)
        caller = await swarm.caller()
        ids = [bytes([number]) * 16 for number in range(2)]
        elder, younger = [(await begun(swarm, host, 2, caller, session=each, max_length=8 * PAGE))[1] for each in ids]
        await answer(caller, elder, tokens(3 * PAGE), 2, start=2 * PAGE)
        await answer(caller, younger, tokens(PAGE), 2, start=2 * PAGE)
        await send(younger, tokens(1), 3, start=3 * PAGE)
        for seq in range(3, 6):
            await answer(caller, elder, tokens(1), seq, start=5 * PAGE - 1)
            await trio.sleep(2 * SHORT_S)
        assert host.task.engine.short
        assert host.server.sessions == 2


async def test_sessions_without_pages_are_not_ended_for_those_that_need_some(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, kv_tokens=10 * PAGE)
        elder, elders = await begun(swarm, host, 1, max_length=10 * PAGE)
        younger, youngers = await begun(swarm, host, 2, max_length=10 * PAGE)
        newcomer = await swarm.caller()
        newcomers = await newcomer.open(host, prompt_length=1, max_length=10 * PAGE)
        await answer(elder, elders, tokens(5 * PAGE), 2, start=PAGE)
        await answer(younger, youngers, tokens(2 * PAGE), 2, start=2 * PAGE)
        for stream, pages in ((elders, 6), (newcomers, 0)):
            await send(stream, tokens(PAGE), 3 if pages else 1, start=pages * PAGE)
        await trio.sleep(SHORT_S / 2)
        await answer(younger, youngers, tokens(1), 3, start=4 * PAGE - 1)
        for stream in (elders, newcomers):
            with trio.fail_after(3 * SHORT_S):
                assert isinstance(await next_answer(stream), torch.Tensor)
        assert host.server.sessions == 2
