"""A program in Python over a daemon's socket: sessions that roll back and fork, adapters of its own, and all ends."""

from __future__ import annotations

import pytest
import torch
import trio

from peerd.client.blocks import ModelFacts
from peerd.compute.adapters.lora import PROMPT, DeepPrompt, LoraAdapter, LoraPair
from peerd.local.blocks import open_daemon_blocks
from peerd.local.channel import open_channel
from peerd.local.messages import LocalOpen, SessionOpened
from peerd.protocol.errors import (
    ConnectionLost,
    ContextTooLong,
    InvalidRequest,
    NoChain,
    RemoteProtocolError,
    UnsupportedFeature,
)
from peerd.protocol.messages.session import Output
from peerd.protocol.rows import Fork, RowSlice
from peerd.protocol.span import Span
from peerd.testing.fake_engine import FAKE_LAYER, fake_forward

pytestmark = pytest.mark.real_time

BLOCKS, WIDTH = Span(0, 9), 8
FACTS = ModelFacts("bytes", bytes(range(32)), 9, WIDTH, 1024, "float32")
ROW = torch.randint(0, 251, (12, WIDTH), generator=torch.Generator().manual_seed(0)).float()


def own_adapter(rank=2):
    draw = torch.Generator().manual_seed(1)
    weights = {
        (block, FAKE_LAYER): LoraPair(
            torch.randn(rank, WIDTH, generator=draw), torch.randn(WIDTH, rank, generator=draw), 1.0
        )
        for block in (0, 4)
    }
    return LoraAdapter(weights | {(block, PROMPT): DeepPrompt(ROW[:2]) for block in (1, 8)})


async def test_a_session_rolls_back_and_forks_as_one_of_this_process(open_daemon):
    async with open_daemon() as daemon, open_daemon_blocks(daemon.socket, FACTS) as blocks:
        session = await blocks.start_session(max_length=64, max_rows=2, max_rollback=8)
        assert torch.equal(await session.step(ROW[:6], want="all"), fake_forward(ROW[:6], BLOCKS))
        await session.step(ROW[8:10], start=4)
        expected = torch.cat((ROW[:4], ROW[8:10], ROW[:1]))
        assert torch.equal(await session.step(ROW[:1]), fake_forward(expected, BLOCKS)[-1:])
        forked = await session.step(ROW[2:3], rows=[RowSlice(1, 3, 1)], ops=[Fork(0, 1, 3)])
        assert torch.equal(forked, fake_forward(torch.cat((ROW[:3], ROW[2:3])), BLOCKS)[-1:])
        assert session.log.lengths == {0: 7, 1: 4}
        with pytest.raises(ContextTooLong, match="max_length 64"):
            await session.step(ROW.repeat(8, 1))
        assert not session.closed
        session.close()
        with pytest.raises(trio.ClosedResourceError):
            await session.step(ROW[:1])


async def test_rows_that_are_longer_than_a_message_travel_in_several(open_daemon, monkeypatch):
    monkeypatch.setattr("peerd.local.session._POSITIONS_AT_ONCE", 5)
    async with open_daemon() as daemon, open_daemon_blocks(daemon.socket, FACTS) as blocks:
        session = await blocks.start_session(max_length=64, max_rollback=8)
        assert torch.equal(await session.step(ROW, want="all"), fake_forward(ROW, BLOCKS))
        assert torch.equal(await session.step(ROW, start=4), fake_forward(torch.cat((ROW[:4], ROW)), BLOCKS)[-1:])


async def test_an_adapter_of_ones_own_acts_in_the_session(open_daemon):
    adapter = own_adapter()
    async with open_daemon(client_adapters=10_000) as daemon, open_daemon_blocks(daemon.socket, FACTS) as blocks:
        session = await blocks.start_session(max_length=64, adapter=adapter)
        assert torch.equal(await session.step(ROW, want="all"), fake_forward(ROW, BLOCKS, adapter.weights))
        plain = await blocks.start_session(max_length=64)
        assert torch.equal(await plain.step(ROW, want="all"), fake_forward(ROW, BLOCKS))


async def test_what_the_peers_refuse_is_the_programs_error(open_daemon):
    async with open_daemon() as daemon, open_daemon_blocks(daemon.socket, FACTS) as blocks:
        with pytest.raises((UnsupportedFeature, NoChain), match="adapter"):
            await blocks.start_session(max_length=64, adapter=own_adapter())
        with pytest.raises(ContextTooLong, match="bytes takes 1024"):
            await blocks.start_session(max_length=2000)
        with pytest.raises(InvalidRequest, match="257 rows wanted"):
            await blocks.start_session(max_length=64, max_rows=257)
        with pytest.raises(InvalidRequest, match="prompts of shape"):
            await blocks.forward(ROW, rows=[12], prompts=torch.ones(2, 1, 3, WIDTH))
        with pytest.raises(ContextTooLong, match="a row of 1025 positions"):
            await blocks.forward(torch.ones(1025, WIDTH), rows=[1025])


async def test_a_step_that_was_cancelled_ends_its_session_and_keeps_what_was_answered(open_daemon, monkeypatch):
    async with open_daemon() as daemon, open_daemon_blocks(daemon.socket, FACTS) as blocks:
        session = await blocks.start_session(max_length=64)
        await session.step(ROW[:3])
        with trio.CancelScope() as scope:
            send = session._channel.send

            async def send_and_cancel(message, **tensors):
                await send(message, **tensors)
                scope.cancel()

            monkeypatch.setattr(session._channel, "send", send_and_cancel)
            await session.step(ROW[3:6])
        assert scope.cancelled_caught
        assert session.closed
        assert torch.equal(session.log.sent(0, 3), ROW[:3])
        while session.log.lengths != {0: 3}:
            await trio.sleep(0.01)


async def test_a_daemon_that_goes_is_said_by_every_session(open_daemon):
    stop, stopped = trio.Event(), trio.Event()

    async def serve(task_status):
        async with open_daemon() as daemon:
            task_status.started(daemon)
            await stop.wait()
        stopped.set()

    async with trio.open_nursery() as nursery:
        daemon = await nursery.start(serve)
        async with open_daemon_blocks(daemon.socket, FACTS) as blocks:
            session = await blocks.start_session(max_length=64)
            await session.step(ROW[:3])
            stop.set()
            await stopped.wait()
            with pytest.raises(ConnectionLost, match=r"the daemon on .*p\.sock has gone: start it again"):
                await session.step(ROW[3:4])
            with pytest.raises(InvalidRequest, match=r"no peerd listens on .*p\.sock"):
                await blocks.start_session(max_length=64)


@pytest.mark.parametrize(
    ("wanted", "parameters", "said"),
    [
        ({"model": "nobody's"}, {}, 'there is no model "nobody\'s" here; models: bytes'),
        ({"model": "bytes", "end": 10}, {}, "has blocks 0:9, not 0:10"),
        ({"model": "bytes"}, {(0, "layer.lora_A"): ROW[:2]}, r"one of a pair, layer\.lora_A and layer\.lora_B"),
        (
            {"model": "bytes", "max_length": 8},
            {(0, "prompt"): torch.ones(3)},
            r"prompt or prefix is \[positions, width\]",
        ),
        ({"model": "bytes", "adapter": "poet"}, {(0, PROMPT): ROW[:2]}, "a session has one of both"),
        ({"model": "bytes", "adapter": "../poet"}, {}, "an adapter's name in the swarm; send your own"),
        ({"model": "bytes", "max_length": 8, "adapter": "poet"}, {}, "poet"),
    ],
)
async def test_a_websocket_that_cannot_be_opened_says_why(open_daemon, wanted, parameters, said):
    async with open_daemon() as daemon, open_channel(daemon.socket) as channel:
        await channel.open(LocalOpen(**wanted), parameters)
        with pytest.raises((InvalidRequest, NoChain), match=said):
            await channel.receive(SessionOpened)


async def test_what_came_out_of_turn_is_the_daemons_fault(open_daemon):
    async with open_daemon() as daemon, open_channel(daemon.socket) as channel:
        await channel.open(LocalOpen(FACTS.digest.hex()), {})
        with pytest.raises(RemoteProtocolError, match="said 'opened' out of turn"):
            await channel.receive(Output)
