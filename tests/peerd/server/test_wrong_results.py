"""Results that cannot be right are told, and blamed on nobody else."""

import pytest
import torch

from peerd.compute.steps import BatchOutput
from peerd.protocol.errors import (
    BadResult,
    UnsupportedFeature,
)
from peerd.protocol.messages.session import (
    LinkDown,
    Route,
)
from peerd.protocol.span import Span
from peerd.testing.fake_engine import FakeEngine, fake_forward
from tests.fakes.rude_clients import WIDTH, answer, next_answer, send, serves_well, tokens


class NanEngine(FakeEngine):
    """Fails for a session that begins a row with the number 13."""

    def run(self, batch):
        output = super().run(batch)
        finite = tuple(
            not bool((piece.step.hidden[:, 0] == 13.0).any()) and good
            for piece, good in zip(batch.pieces, output.finite, strict=True)
        )
        return BatchOutput(output.hidden, finite)


def poisoned(count):
    row = tokens(count)
    row[0, 0] = 13.0
    return row


async def test_a_result_that_is_not_finite_is_told_to_its_session_alone(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, engine_type=NanEngine)
        caller, other = await swarm.caller(), await swarm.caller()
        stream = await caller.open(host)
        good = await other.open(host, session=b"g" * 16)
        row = tokens(2)
        row[:, 0] = 1.0
        await send(stream, poisoned(2))
        await send(stream, row[:1], 2, start=2)
        assert torch.equal(await answer(other, good, row), fake_forward(row, Span(0, 4))[-1:])
        assert isinstance(await next_answer(stream), BadResult)
        # What was built on it falls with it; the session goes on from where the bad step began.
        assert isinstance(await next_answer(stream), BadResult)
        assert torch.equal(await answer(caller, stream, row, 3), fake_forward(row, Span(0, 4))[-1:])


async def test_a_client_leaves_a_peer_whose_results_are_not_finite(open_swarm, whole_forward):
    async with open_swarm() as swarm:
        await swarm.serve(0, 3)
        bad = await swarm.serve(3, 6, engine_type=NanEngine)
        await swarm.serve(6, 9)
        client = await swarm.client()
        session = await client.session(Span(0, 9))
        row = next(row for row in (tokens(4, seed) for seed in range(2000)) if _reaches_thirteen(row))
        await swarm.serve(3, 6)
        client.finder.track_record.failed(swarm.hosts[-1].peer_id)
        assert torch.equal(await session.step(row, want="all"), whole_forward(row, 9))
        assert bad.peer_id in client.finder.failures
        assert bad.peer_id not in [hop.peer for hop in session.chain]


def _reaches_thirteen(row):
    return bool((fake_forward(row, Span(0, 3))[:, 0] == 13.0).any())


class LoudEngine(FakeEngine):
    """Finite in the engine's own float32, beyond what float16 holds."""

    def run(self, batch):
        output = super().run(batch)
        return BatchOutput(tuple(part * 1e5 for part in output.hidden), output.finite)


@pytest.mark.parametrize("fields", [{"dtype": "float16"}, {"codec": "int8", "dtype": "float16"}])
async def test_a_result_that_the_sessions_dtype_cannot_hold_is_the_callers_fault(open_swarm, fields):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, engine_type=LoudEngine)
        caller, other = await swarm.caller(), await swarm.caller()
        stream = await caller.open(host, **fields)
        assert isinstance(await answer(caller, stream, tokens(2)), UnsupportedFeature)
        good = await other.open(host, session=b"g" * 16)
        assert (await answer(other, good, tokens(2))).shape == (1, WIDTH)


async def test_a_replay_that_the_dtype_cannot_hold_is_a_link_that_fails(open_swarm):
    async with open_swarm() as swarm:
        host, after = await swarm.serve(0, 4, engine_type=LoudEngine), await swarm.serve(4, 8)
        caller = await swarm.caller()
        await caller.open(after, hop=1)
        stream = await caller.open(host, dtype="float16", codec="int8", next=caller.next_hop(host, after))
        assert isinstance(await answer(caller, stream, tokens(2)), UnsupportedFeature)
        said = await caller.ask(stream, Route(epoch=1, next=caller.next_hop(host, after, epoch=1)))
        assert isinstance(said, LinkDown)
        assert await serves_well(swarm, after)
