"""Clients acknowledge what servers computed; servers believe no more than they computed themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import trio

from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.identity import Identity
from peerd.protocol.messages.receipts import Acknowledge, Receipt, sign_receipt
from peerd.protocol.messages.session import Failure
from peerd.protocol.span import Span
from peerd.server.sessions.acknowledged import RECEIPT_EVERY
from tests.fakes.rude_clients import answer, tokens
from tests.peerd.conftest import MODEL, WIDTH


def acknowledged(host):
    return [(row.peer_id, row.sessions, row.positions, row.block_positions) for row in host.receipts]


async def test_a_session_that_ends_acknowledges_what_each_hop_computed(open_swarm):
    async with open_swarm() as swarm:
        hosts = [await swarm.serve(0, 4), await swarm.serve(4, 6)]
        client = await swarm.client()
        for _ in range(2):
            session = await client.session(Span(0, 6))
            await session.step(torch.ones(10, WIDTH))
            await session.step(torch.ones(1, WIDTH))
            session.close()
            await trio.sleep(1)
        me = client.identity.peer_id
        assert [acknowledged(host) for host in hosts] == [[(me, 2, 22, 88)], [(me, 2, 22, 44)]]
        assert [host.server.sessions for host in hosts] == [0, 0]


async def test_a_long_session_acknowledges_now_and_then(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, kv_tokens=8192)
        client = await swarm.client()
        session = await client.session(Span(0, 4), max_length=1000, max_rows=2)
        for row in range(2):
            await session.step(torch.ones(1000, WIDTH), row=row)
        await trio.sleep(1)
        (row,) = host.receipts
        assert RECEIPT_EVERY <= row.positions < 2000
        assert host.server.sessions == 1
        swarm.vanish(client)
        await trio.sleep(1)
        assert acknowledged(host) == [(client.identity.peer_id, 1, row.positions, 4 * row.positions)]


async def test_hops_that_replace_others_are_acknowledged_for_their_own_part(open_swarm):
    async with open_swarm() as swarm:
        hosts = [await swarm.serve(0, 4), await swarm.serve(4, 6)]
        client = await swarm.client()
        session = await client.session(Span(0, 6))
        await session.step(torch.ones(10, WIDTH))
        twin = await swarm.serve(4, 6)
        swarm.kill(hosts[1])
        await session.step(torch.ones(3, WIDTH))
        session.close()
        await trio.sleep(1)
        assert [row.positions for row in hosts[0].receipts] == [13]
        assert [row.positions for row in twin.receipts] == [3]


async def test_a_hop_that_is_overtaken_without_blame_is_acknowledged(open_swarm):
    async with open_swarm() as swarm:
        hosts = [await swarm.serve(0, 4), await swarm.serve(4, 6)]
        client = await swarm.client()
        session = await client.session(Span(0, 6))
        await session.step(torch.ones(10, WIDTH))

        async def stuck(run, batch):
            await trio.sleep_forever()

        await swarm.serve(4, 6)
        hosts[1].task.device.run_batch = stuck
        await session.step(torch.ones(3, WIDTH))
        await trio.sleep(1)
        assert client.finder.failures == []
        assert [row.positions for row in hosts[1].receipts] == [10]
        session.close()


async def test_a_server_that_asks_for_none_gets_none(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, asks_for_receipts=False)
        client = await swarm.client()
        session = await client.session(Span(0, 4), max_length=1000, max_rows=2)
        for row in range(2):
            await session.step(torch.ones(1000, WIDTH), row=row)
        session.close()
        await trio.sleep(1)
        assert host.server.sessions == 0
        assert acknowledged(host) == []


async def opened(swarm):
    host = await swarm.serve(0, 4)
    caller = await swarm.caller()
    stream = await caller.open(host)
    await answer(caller, stream, tokens(5))
    return host, caller, stream, Receipt(b"s" * 16, 0, host.peer_id, MODEL, 0, 4, 5)


async def acknowledge(stream, identity, receipt):
    await stream.send(Acknowledge(sign_receipt(identity, receipt)).to_header())


async def is_refused(caller, stream):
    said = await caller.hear(stream)
    return isinstance(said, Failure) and isinstance(said.error, RemoteProtocolError)


async def test_more_than_was_computed_is_not_believed(open_swarm):
    async with open_swarm() as swarm:
        host, caller, stream, receipt = await opened(swarm)
        await acknowledge(stream, caller.identity, replace(receipt, positions=2**60))
        await answer(caller, stream, tokens(1), 2, start=5)
        assert acknowledged(host) == [(caller.identity.peer_id, 1, 5, 20)]
        # It said all that it ever can.
        await acknowledge(stream, caller.identity, replace(receipt, positions=6))
        assert await is_refused(caller, stream)


@pytest.mark.parametrize(
    "wrong",
    [
        {"session": b"t" * 16},
        {"hop": 1},
        {"model": bytes(32)},
        {"start": 1},
        {"end": 5},
        {"server": Identity.from_seed(bytes(32)).peer_id},
        {"positions": 0},
    ],
    ids=str,
)
async def test_a_receipt_of_something_else_ends_the_session_and_counts_nothing(open_swarm, wrong):
    async with open_swarm() as swarm:
        host, caller, stream, receipt = await opened(swarm)
        await acknowledge(stream, caller.identity, replace(receipt, **wrong))
        assert await is_refused(caller, stream)
        assert acknowledged(host) == []
        assert host.server.sessions == 0


async def test_a_receipt_that_another_signed_is_refused(open_swarm):
    async with open_swarm() as swarm:
        host, caller, stream, receipt = await opened(swarm)
        await acknowledge(stream, Identity.from_seed(bytes(32)), receipt)
        assert await is_refused(caller, stream)
        assert acknowledged(host) == []


async def test_a_receipt_counts_once(open_swarm):
    async with open_swarm() as swarm:
        host, caller, stream, receipt = await opened(swarm)
        for _ in range(2):
            await acknowledge(stream, caller.identity, receipt)
        assert await is_refused(caller, stream)
        assert acknowledged(host) == [(caller.identity.peer_id, 1, 5, 20)]


async def test_a_flood_of_valid_receipts_ends_the_session(open_swarm):
    """Each says more than the one before it, and costs the check of a signature; none of it was computed."""
    async with open_swarm() as swarm:
        host, caller, stream, receipt = await opened(swarm)
        for number in range(17):
            await acknowledge(stream, caller.identity, replace(receipt, positions=100 + number))
        assert await is_refused(caller, stream)
        assert acknowledged(host) == [(caller.identity.peer_id, 1, 5, 20)]
        assert host.server.sessions == 0


@pytest.mark.parametrize("data", [b"", bytes(157), bytes(159), bytes(15_000)], ids=len)
async def test_bytes_that_are_no_receipt_are_refused(open_swarm, data):
    async with open_swarm() as swarm:
        host, caller, stream, _ = await opened(swarm)
        await stream.send({"type": "receipt", "receipt": data})
        assert await is_refused(caller, stream)
        assert acknowledged(host) == []


async def test_a_receipt_that_nobody_asked_for_is_refused(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, asks_for_receipts=False)
        caller = await swarm.caller()
        stream = await caller.open(host)
        await acknowledge(stream, caller.identity, Receipt(b"s" * 16, 0, host.peer_id, MODEL, 0, 4, 1))
        assert await is_refused(caller, stream)
