"""Which hop is slow with a prompt is found out for a trace, and asked of nobody without one."""

from __future__ import annotations

import pytest
import torch

from peerd.client.prompt_watch import LOOK_S, watching_prompt
from peerd.protocol.span import Span

BLOCKS = Span(0, 6)
PROMPT = torch.ones(3, 8)


class Trace:
    """Notes what it is told of prompts: a hop's blocks, when it began, and how long it took."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, str, float, float]] = []

    def serving(self, hops: object) -> None: ...

    def prompt(self, number: int, hop: tuple[str, str], ago_s: float, took_s: float) -> None:
        self.parts.append((number, hop[1], ago_s, took_s))

    def end(self, how: str, tokens: int) -> None: ...


async def test_each_hop_s_part_of_a_prompt_is_timed(open_swarm):
    async with open_swarm() as swarm:
        for start, step_s in ((0, 0.5), (2, 3.0), (4, 1.0)):
            await swarm.serve(start, start + 2, step_s=step_s)
        session = await (await swarm.client()).session(BLOCKS)
        trace = Trace()
        async with watching_prompt(session, trace):
            await session.step(PROMPT)
        assert [part[:2] for part in trace.parts] == [(0, "0:2"), (1, "2:4"), (2, "4:6")]
        for (_, _, _, took_s), step_s in zip(trace.parts, (0.5, 3.0, 1.0), strict=True):
            assert took_s == pytest.approx(step_s, abs=3 * LOOK_S)
        assert [round(ago_s) for _, _, ago_s, _ in trace.parts] == [5, 4, 1]


async def test_a_hop_that_hangs_is_seen_to_take_all_of_the_time(open_swarm):
    async with open_swarm() as swarm:
        first, last = await swarm.serve(0, 3), await swarm.serve(3, 6, step_s=30.0)
        session = await (await swarm.client()).session(BLOCKS)
        trace = Trace()
        async with watching_prompt(session, trace):
            await session.step(PROMPT)
        took = {blocks: took_s for _, blocks, _, took_s in trace.parts}
        assert (took["0:3"] < 1, took["3:6"] > 29) == (True, True), (first, last)


async def test_a_later_prompt_of_the_session_is_timed_alone(open_swarm):
    async with open_swarm() as swarm:
        await swarm.serve(0, 6, step_s=2.0)
        session = await (await swarm.client()).session(BLOCKS)
        await session.step(PROMPT)
        trace = Trace()
        async with watching_prompt(session, trace):
            await session.step(PROMPT)
        assert [took_s for *_, took_s in trace.parts] == [pytest.approx(2.0, abs=3 * LOOK_S)]


async def test_without_a_trace_no_hop_is_asked(open_swarm, monkeypatch):
    async with open_swarm() as swarm:
        await swarm.serve(0, 6, step_s=2.0)
        session = await (await swarm.client()).session(BLOCKS)
        monkeypatch.setattr(session, "how_far", lambda _timeout_s: pytest.fail("a hop was asked"))
        async with watching_prompt(session, None):
            await session.step(PROMPT)


async def test_what_ends_the_prompt_comes_out_as_it_is(open_swarm):
    async with open_swarm() as swarm:
        await swarm.serve(0, 6)
        session = await (await swarm.client()).session(BLOCKS)
        with pytest.raises(KeyError):
            async with watching_prompt(session, Trace()):
                raise KeyError
