"""Servers that die in mid-answer cost no token; if a server has no twin, the answer fails and the error names its
blocks.
"""

from __future__ import annotations

import signal

import pytest
import trio

import peerd

pytestmark = [pytest.mark.real_time, pytest.mark.model, pytest.mark.processes]

QUESTION = "Explain what a list comprehension is."
STORY = "Once upon a time"
NEW_TOKENS = 32


async def finish(generation) -> None:
    async for _ in generation:
        pass


def serving(generation, processes, hop):
    """The process behind a hop of the chain that answers now."""
    peer = generation.chain[hop].peer
    return next(process for process in processes if process.peer_id == peer)


async def test_servers_are_killed_in_mid_answer_and_their_twins_finish_it(open_processes, model_path, reference):
    """Both of a chain, one after the other; an answer beside it is not to notice either."""
    async with (
        open_processes("0:15", "15:30", "0:15", "15:30") as (bootstrap, *servers),
        peerd.open_peer(bootstrap=[bootstrap.address]) as client,
        client.model(model_path) as model,
    ):
        answer = reference.answer(reference.encode(QUESTION, chat=True), NEW_TOKENS)
        generation = model.generate(QUESTION, chat=True, temperature=0, max_new_tokens=NEW_TOKENS)
        other = model.generate(STORY, temperature=0, max_new_tokens=NEW_TOKENS)
        victims = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(finish, other)
            async for _ in generation:
                if len(generation.token_ids) in (8, 20):
                    victims.append(serving(generation, servers, hop=len(victims)))
                    victims[-1].process.send_signal(signal.SIGKILL)
        assert len(victims) == 2
        assert tuple(generation.token_ids[: len(answer.decisive)]) == answer.decisive
        assert generation.failovers == 2
        assert not {hop.peer for hop in generation.chain} & {victim.peer_id for victim in victims}
        beside = reference.answer(reference.encode(STORY), NEW_TOKENS)
        assert tuple(other.token_ids[: len(beside.decisive)]) == beside.decisive

        # No twin is left now.
        generation = model.generate(QUESTION, chat=True, temperature=0, max_new_tokens=NEW_TOKENS)

        async def kill_the_last() -> None:
            async for _ in generation:
                if len(generation.token_ids) == 8:
                    serving(generation, servers, hop=1).process.send_signal(signal.SIGKILL)

        with pytest.raises(peerd.NoChain, match="15:30") as caught:
            await kill_the_last()
        assert caught.value.missing == ((15, 30),)
        assert tuple(generation.token_ids) == answer.token_ids[: len(generation.token_ids)]
        assert len(generation.token_ids) >= 8


async def test_a_server_that_stops_responding_is_replaced_within_seconds(open_processes, model_path, reference):
    """A process that hangs breaks no connection: only silence tells."""
    async with (
        open_processes("0:15", "15:30", "15:30") as (bootstrap, *servers),
        peerd.open_peer(bootstrap=[bootstrap.address]) as client,
        client.model(model_path) as model,
    ):
        answer = reference.answer(reference.encode(QUESTION, chat=True), NEW_TOKENS)
        generation = model.generate(QUESTION, chat=True, temperature=0, max_new_tokens=NEW_TOKENS)
        victim = None
        longest_s, before = 0.0, trio.current_time()
        try:
            async for _ in generation:
                if len(generation.token_ids) == 8:
                    victim = serving(generation, servers, hop=1).process
                    victim.send_signal(signal.SIGSTOP)
                longest_s, before = max(longest_s, trio.current_time() - before), trio.current_time()
        finally:
            if victim is not None:
                victim.send_signal(signal.SIGCONT)
        assert tuple(generation.token_ids[: len(answer.decisive)]) == answer.decisive
        assert generation.failovers == 1
        assert longest_s < 20
