"""A peer that pauses for its owner serves its owner's own programs, and nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trio

import peerd
from peerd.client.finding.finder import Patience
from peerd.testing.network import MemoryNetwork

LISTEN = "/ip4/10.0.0.2/tcp/4000/ws"
NO_PATIENCE = Patience(missing_s=0.0, busy_s=0.0)


async def offered(peer: peerd.Peer, blocks: peerd.ServedBlocks, state: str) -> None:
    """Wait until the peer sees these blocks offered in this state."""
    facts = blocks.facts
    while True:
        offers = await peer.discovery.directory.servers(facts.digest, facts.block_count, max_age_s=0.0)
        if [offer.record.state for offer in offers] == [state]:
            return
        await trio.sleep(0.02)


@pytest.mark.real_time
async def test_a_paused_peer_s_blocks_are_its_owner_s_alone(tiny_llama: Path) -> None:
    network, hidden = MemoryNetwork(), torch.ones(2, 32)
    spec = peerd.ServeSpec(tiny_llama, kv_tokens=64, throughput=100.0, memory_bytes=2**30)
    bootstrap = "/ip4/10.0.0.1/tcp/4000/ws"
    async with (
        peerd.open_peer(transport=network.transport("10.0.0.1"), listen=[bootstrap]) as first,
        peerd.open_peer(
            transport=network.transport("10.0.0.2"),
            listen=[LISTEN],
            bootstrap=[f"{bootstrap}/p2p/{first.peer_id}"],
            serve=[spec],
        ) as owner,
        owner.blocks(tiny_llama, lambda _: None) as own,
        first.blocks(tiny_llama, lambda _: None) as others,
    ):
        await others.forward(hidden[None], keep=False, patience=NO_PATIENCE)
        async with own.session(max_length=8) as session:
            before = await session.step(hidden)
            # What is under way of the owner's is not waited for.
            with trio.fail_after(5):
                await owner.pause(60)
            await offered(first, others, "draining")
            await offered(owner, own, "online")
            assert (await session.step(hidden)).shape == before.shape
        async with own.session(max_length=8, patience=NO_PATIENCE) as session:
            assert torch.equal(await session.step(hidden), before)
        await own.forward(hidden[None], keep=False, patience=NO_PATIENCE)
        with pytest.raises(peerd.NoChain):
            await others.forward(hidden[None], keep=False, patience=NO_PATIENCE)
        owner.resume()
        await offered(first, others, "online")
        await others.forward(hidden[None], keep=False, patience=NO_PATIENCE)
