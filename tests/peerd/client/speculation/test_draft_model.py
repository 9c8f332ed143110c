"""A tiny model that drafts for itself over a swarm on loopback: the same tokens, few steps, and nothing is left."""

from __future__ import annotations

import logging
import shutil
import threading
from functools import partial

import pytest
import trio
import trio.testing

import peerd
from peerd.client.speculation.confidence import GRADES, Ask
from peerd.client.speculation.draft_model import open_draft
from peerd.client.speculation.drafts import Draft
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.greedy_text import WholeModel
from peerd.compute.errors import NonFiniteError
from peerd.protocol.errors import InvalidRequest

pytestmark = pytest.mark.real_time
LISTEN = "/ip4/127.0.0.1/tcp/0/ws"
PROMPT = [*range(40, 60)]
POSITIONS = 16384
ALL = Ask(8, 0.0, dict.fromkeys(GRADES, 1.0))


async def answer(model, on_token=lambda *_: None, **asked):
    asked = {"temperature": 0, "max_new_tokens": 48, "eos_token_ids": []} | asked
    generation = model.generate(PROMPT, **asked)
    async for token in generation:
        # Until the draft model has read the prompt there is nothing to see.
        if token.position == len(PROMPT) and model.speculation.model is not None:
            await trio.testing.wait_all_tasks_blocked(0.05)
        on_token(generation, token)
    return generation


def serve(path, *span, bootstrap=()):
    spec = peerd.ServeSpec(path, peerd.Span(*span), kv_tokens=2048, throughput=1000.0, stay=True)
    return peerd.open_peer(listen=[LISTEN], serve=[spec], bootstrap=bootstrap)


async def serve_until_killed(path, span, bootstrap, task_status):
    with trio.CancelScope() as scope:
        async with serve(path, *span, bootstrap=bootstrap) as peer:
            task_status.started((peer.peer_id, scope))
            await trio.sleep_forever()


async def test_a_model_that_drafts_for_itself_is_right_and_changes_nothing(path, always_asked):
    async with serve(path, 0, 2) as server, peerd.open_peer(bootstrap=server.addresses) as peer:
        async with peer.model(path) as model:
            plain = await answer(model)
            drawn = await answer(model, temperature=1.0, seed=4)
        async with peer.model(path, draft=path) as model:
            drafted = await answer(model)
            assert drafted.token_ids == plain.token_ids
            assert drafted.drafted >= 12
            assert drafted.accepted >= 0.95 * drafted.drafted
            assert (await answer(model, temperature=1.0, seed=4)).token_ids == drawn.token_ids
            source = model.speculation.model
            assert source.times.token_s > 0
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert source.free_positions == POSITIONS


async def test_a_death_in_mid_window_changes_no_token(path, always_asked):
    async with serve(path, 0, 1) as first, trio.open_nursery() as nursery:
        start = partial(nursery.start, serve_until_killed, path, (1, 2), first.addresses)
        servers = dict([await start(), await start()])
        async with peerd.open_peer(bootstrap=first.addresses) as peer, peer.model(path, draft=path) as model:
            plain = await answer(model, speculate=False)

            def kill(generation, token):
                if token.position == len(PROMPT) + 15:
                    servers[generation.chain[1].peer].cancel()

            drafted = await answer(model, kill)
            assert drafted.failovers == 1
            assert drafted.token_ids == plain.token_ids
            assert drafted.accepted > 10
        nursery.cancel_scope.cancel()


async def test_one_with_another_tokenizer_is_refused_by_name(path, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(path, other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace("<end>", "<stop>"))
    config = other / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<end>", "<stop>"))
    async with peerd.open_peer() as peer:
        with pytest.raises(InvalidRequest, match=r"other cannot draft for bytes\d*: it has no token '<end>'"):
            async with peer.model(path, draft=other):
                pass


def opened(path, byte_tokenizer):
    return open_draft(open_checkpoint(path), byte_tokenizer, 257, "bytes")


async def ready(drafter):
    with trio.fail_after(30):
        while not drafter.ready:
            await trio.sleep(0.001)


async def test_a_cancelled_answer_frees_its_memory_and_leaves_no_thread(path, byte_tokenizer, monkeypatch):
    computing, may_go_on = threading.Event(), threading.Event()
    may_go_on.set()
    calls = []
    compute = WholeModel.compute

    def slowly(self, *given):
        calls.append(given)
        computing.set()
        assert may_go_on.wait(30)
        return compute(self, *given)

    monkeypatch.setattr(WholeModel, "compute", slowly)
    async with opened(path, byte_tokenizer) as draft, trio.open_nursery() as nursery:
        drafter = draft.drafter(PROMPT, 200)
        await ready(drafter)
        assert draft.free_positions < POSITIONS
        computing.clear()
        may_go_on.clear()
        calls.clear()
        nursery.start_soon(drafter.propose, PROMPT, ALL)
        await trio.to_thread.run_sync(computing.wait, 30)
        nursery.cancel_scope.cancel()
        drafter.end()
        may_go_on.set()
    assert len(calls) == 1
    assert draft.free_positions == POSITIONS
    assert draft._limiter.borrowed_tokens == 0


async def test_an_answer_that_ends_while_the_prompt_is_read_frees_its_memory(path, byte_tokenizer):
    async with opened(path, byte_tokenizer) as draft:
        drafter = draft.drafter(PROMPT * 10, 400)
        drafter.end()
        with trio.fail_after(30):
            while draft.free_positions < POSITIONS:
                await trio.sleep(0.001)
        assert await drafter.propose(PROMPT, ALL) == Draft()


async def test_a_draft_model_that_fails_is_not_asked_again_and_the_answer_goes_on(
    path, byte_tokenizer, monkeypatch, caplog
):
    async with opened(path, byte_tokenizer) as draft:
        drafter = draft.drafter(PROMPT, 200)
        await ready(drafter)

        def fail(self, *given):
            raise NonFiniteError("blocks 0:2 gave NaN")

        monkeypatch.setattr(WholeModel, "compute", fail)
        with caplog.at_level(logging.WARNING):
            assert await drafter.propose(PROMPT, ALL) == Draft()
        assert not drafter.ready
        assert "goes on without it: blocks 0:2 gave NaN" in caplog.text


async def test_answers_beyond_its_memory_have_no_guesses_and_disturb_no_other(path, byte_tokenizer):
    async with opened(path, byte_tokenizer) as draft:
        [alone] = [draft.drafter(PROMPT, 200)]
        await ready(alone)
        expected = await alone.propose(PROMPT, ALL)
        # Together they have more positions than there is KV for.
        others = [draft.drafter(PROMPT * 25, 512) for _ in range(34)]
        await trio.testing.wait_all_tasks_blocked(0.2)
        assert 0 < sum(other.ready for other in others) < len(others)
        assert await alone.propose(PROMPT, ALL) == expected
        for drafter in (alone, *others):
            drafter.end()
        with trio.fail_after(30):
            while draft.free_positions < POSITIONS:
                await trio.sleep(0.001)


async def test_an_answer_beyond_its_positions_has_no_guesses(path, byte_tokenizer):
    async with opened(path, byte_tokenizer) as draft:
        long = draft.drafter(PROMPT * 30, 700)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not long.ready


async def test_guesses_end_behind_the_first_unlikely_one(path, byte_tokenizer):
    async with opened(path, byte_tokenizer) as draft:
        drafter = draft.drafter(PROMPT, 200)
        await ready(drafter)
        whole = await drafter.propose(PROMPT, ALL)
        assert len(whole) == 8
        short = await drafter.propose(PROMPT, Ask(8, 0.3, dict.fromkeys(GRADES, 0.5)))
        assert short.tokens == whole.tokens[:2]
        assert set(whole.grades) <= set(GRADES)
        assert drafter.reading_s == 0.0
        await drafter.propose([*PROMPT, *whole.tokens, *PROMPT * 2], ALL)
        assert drafter.reading_s > 0.0
