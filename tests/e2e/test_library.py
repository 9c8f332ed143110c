"""peerd inside another Trio program: what its contexts promise about results, errors and endings."""

from __future__ import annotations

from contextlib import aclosing

import pytest
import torch
import trio

import peerd
from peerd.client.finding.finder import Patience
from peerd.discovery.discovery import LEAVE_S

pytestmark = [pytest.mark.real_time, pytest.mark.model]

LISTEN = "/ip4/127.0.0.1/tcp/0/ws"
PROMPT = "The sea is"
# As far as fp32 rounding may take a logit: half of the margin within which greedy tokens are promised.
LOGIT_TOLERANCE = 5e-4


async def until(condition):
    """How soon things happen is tested in simulated time."""
    while not condition():
        await trio.sleep(0.01)


def all_free(swarm) -> bool:
    return all(server.engine.free_tokens == server.engine.total_tokens for server in swarm.servers)


async def test_steps_of_a_session_equal_the_whole_model_also_after_rolling_back(open_local_swarm, reference):
    async with open_local_swarm(2) as swarm, swarm.client() as model:
        ids, other = model.encode(PROMPT + " full of fish that nobody has seen."), model.encode(" not a lake")
        async with model.session(max_length=64, max_rollback=64) as session:
            hidden = await session.step(model.embed(ids), want="all")
            torch.testing.assert_close(await model.logits(hidden), reference.logits(ids), atol=LOGIT_TOLERANCE, rtol=0)
            branch = ids[:4] + other
            hidden = await session.step(model.embed(other, 4), start=4, want="all")
            expected = reference.logits(branch)[4:]
            torch.testing.assert_close(await model.logits(hidden), expected, atol=LOGIT_TOLERANCE, rtol=0)
        await until(lambda: all_free(swarm))


async def test_a_client_without_the_head_gets_the_tokens_of_one_with_it(open_local_swarm):
    samplings = ({"temperature": 0}, {"temperature": 0.9, "seed": 7, "repetition_penalty": 1.2})
    async with open_local_swarm(1, head=True) as swarm:
        answers = []
        for remote_head in (False, True):
            async with swarm.client(remote_head=remote_head) as model:
                for sampling in samplings:
                    generation = model.generate(PROMPT, max_new_tokens=8, speculate=False, **sampling)
                    answers.append([token.id async for token in generation])
                sizes = dict(model.meters.tensor_bytes)
        assert answers[:2] == answers[2:]
        # Hidden states have 2304 bytes a position.
        assert sizes["drawn", "received"] == 4 * sum(map(len, answers[2:]))
        assert ("exact", "received") not in sizes


async def test_a_session_over_some_blocks_equals_those_blocks(open_local_swarm, reference):
    async with open_local_swarm(2) as swarm, swarm.client() as model:
        ids = model.encode(PROMPT)
        states = reference.hidden_states(ids)
        async with model.session(max_length=16, blocks=peerd.Span(10, 20)) as session:
            result = await session.step(states[10], want="all")
        torch.testing.assert_close(result, states[20], atol=1e-3, rtol=1e-4)


async def test_tokens_that_the_model_does_not_have_are_refused(model_path):
    async with peerd.open_peer() as peer, peer.model(model_path) as model:
        for token_id in (-1, 49152):
            with pytest.raises(peerd.InvalidRequest, match=str(token_id)):
                model.embed([1, token_id])
        with pytest.raises(peerd.InvalidRequest, match="49152"):
            await anext(model.generate([49152]).tokens())


async def test_leaving_an_answer_early_frees_the_servers(open_local_swarm):
    async with open_local_swarm(2) as swarm, swarm.client() as model:
        async with aclosing(model.generate(PROMPT, max_new_tokens=64).tokens()) as tokens:
            async for _ in tokens:
                break
        await until(lambda: all_free(swarm))
        assert [server.peer.server.sessions for server in swarm.servers] == [0, 0]


async def test_cancelling_a_client_in_mid_answer_closes_everything(open_local_swarm, model_path):
    async with open_local_swarm(2) as swarm:
        tasks_before = trio.lowlevel.current_statistics().tasks_living
        with trio.CancelScope() as scope:
            async with peerd.open_peer(bootstrap=swarm.bootstrap) as peer, peer.model(model_path) as model:
                async for token in model.generate(PROMPT, temperature=0, max_new_tokens=200, eos_token_ids=()):
                    if token.position > 10:
                        cancelled = trio.current_time()
                        scope.cancel()
        assert trio.current_time() - cancelled < LEAVE_S, "it left as if it had not been cancelled"
        await until(lambda: all_free(swarm))
        await until(lambda: not any(server.peer.connections.live.get(peer.peer_id) for server in swarm.servers))
        await until(lambda: trio.lowlevel.current_statistics().tasks_living <= tasks_before)


async def test_cancelling_a_whole_swarm_in_mid_answer_closes_everything(open_local_swarm):
    tasks_before = trio.lowlevel.current_statistics().tasks_living
    with trio.CancelScope() as scope:
        async with open_local_swarm(2) as swarm, swarm.client() as model:
            async for token in model.generate(PROMPT, temperature=0, max_new_tokens=200, eos_token_ids=()):
                if token.position > 10:
                    addresses = swarm.bootstrap
                    cancelled = trio.current_time()
                    scope.cancel()
    assert trio.current_time() - cancelled < LEAVE_S, "they left as if they had not been cancelled"
    assert trio.lowlevel.current_statistics().tasks_living == tasks_before
    with pytest.raises(OSError, match="connect"):
        await trio.open_tcp_stream(addresses[0].host, addresses[0].port)


async def test_a_server_that_left_is_missed_by_name(open_local_swarm):
    """It said that it left, so that a client that comes later need not try it."""
    async with open_local_swarm(3) as swarm:
        await swarm.servers[1].stop()
        async with swarm.client() as model:
            with pytest.raises(peerd.NoChain, match="10:20") as caught:
                async with model.session(max_length=16, patience=Patience(missing_s=0)):
                    pass
        assert caught.value.missing == ((10, 20),)


async def test_a_server_that_drains_finishes_its_answers_and_takes_no_others(open_local_swarm, reference):
    async with open_local_swarm(1) as swarm, swarm.client() as model, trio.open_nursery() as nursery:
        answer = reference.answer(reference.encode(PROMPT), 16)
        generation = model.generate(PROMPT, temperature=0, max_new_tokens=16)
        async for token in generation:
            if token.position == len(generation.prompt) + 2:
                nursery.start_soon(swarm.servers[0].peer.drain, 30)
        assert tuple(generation.token_ids[: len(answer.decisive)]) == answer.decisive
        with pytest.raises(peerd.NoChain, match="0:30"):
            async with model.session(max_length=16, patience=Patience(missing_s=0)):
                pass


async def test_a_server_answers_its_own_questions_with_the_blocks_it_serves(model_path, reference):
    """Each holds one half, and asks as a client too."""
    first, second = (
        peerd.ServeSpec(model_path, span, quantize="none") for span in (peerd.Span(0, 15), peerd.Span(15, 30))
    )
    async with (
        peerd.open_peer(listen=[LISTEN], serve=[first]) as one,
        peerd.open_peer(listen=[LISTEN], serve=[second], bootstrap=one.addresses) as two,
    ):
        answer = reference.answer(reference.encode(PROMPT), 8)
        for peer in (one, two):
            async with peer.model(model_path) as model:
                generation = model.generate(PROMPT, temperature=0, max_new_tokens=8)
                async for _ in generation:
                    pass
            assert tuple(generation.token_ids[: len(answer.decisive)]) == answer.decisive


async def test_devices_of_one_server_are_hops_of_a_chain(model_path, reference):
    """One order for two devices: each gets half of the blocks, and a session crosses both."""
    spec = peerd.ServeSpec(model_path, peerd.Span(0, 30), device="cpu,cpu", kv_tokens=512, quantize="none")
    async with (
        peerd.open_peer(listen=[LISTEN], serve=[spec]) as server,
        peerd.open_peer(bootstrap=server.addresses) as client,
        client.model(model_path) as model,
    ):
        answer = reference.answer(reference.encode(PROMPT), 8)
        generation = model.generate(PROMPT, temperature=0, max_new_tokens=8)
        async for _ in generation:
            pass
        assert tuple(generation.token_ids[: len(answer.decisive)]) == answer.decisive
        assert [served.span for served in server.served] == [peerd.Span(0, 15), peerd.Span(15, 30)]
        assert len(generation.chain) == 2


async def test_callers_catch_what_was_raised_and_not_a_group(model_path):
    with pytest.raises(KeyError, match="mine"):
        async with peerd.open_peer() as peer, peer.model(model_path):
            raise KeyError("mine")
    async with peerd.open_peer(listen=[LISTEN]) as peer:
        with pytest.raises(OSError, match="in use"):
            async with peerd.open_peer(listen=[peer.addresses[0]]):
                pass
    async with peerd.open_peer() as peer:
        with pytest.raises(peerd.CheckpointError, match="nowhere"):
            async with peer.model(model_path.parent / "nowhere"):
                pass
        with pytest.raises(peerd.InvalidRequest, match="opened as a client"):
            await peer.serve(peerd.ServeSpec(model_path, 1))
