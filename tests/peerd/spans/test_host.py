"""The spans that a peer is asked to serve: announced before they are loaded, moved only where nobody named them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

import peerd
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import CheckpointError
from peerd.protocol.span import Span
from peerd.routing.dht.record_sets import PartialView
from peerd.spans import loading as span_loader
from peerd.spans.mover import Rebalancer
from peerd.spans.swap import LOAD_ERRORS
from peerd.testing.network import MemoryNetwork


@pytest.mark.real_time
async def test_others_hear_of_a_first_span_before_it_is_loaded(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, first = MemoryNetwork(), "/ip4/10.0.0.1/tcp/4000/ws"
    spec = peerd.ServeSpec(tiny_llama, 4, kv_tokens=64, throughput=100.0, memory_bytes=2**30)
    seen: list[dict[int, str]] = []
    load_served = span_loader.load_served

    async def load_while_others_look(*arguments: Any) -> Any:
        words: dict[int, str] = {}
        while not any("joining" in word for word in words.values()):
            # A machine with much to do may not answer in time.
            with suppress(PartialView):
                holdings = await bootstrap.discovery.directory.holdings(digest, blocks)
                words = {one.record.slot: f"{one.record.span} {one.record.state}" for one in holdings}
            # Looking without a pause is a flood, for which peers are refused.
            await trio.sleep(0.05)
        seen.append(words)
        return await load_served(*arguments)

    monkeypatch.setattr(span_loader, "load_served", load_while_others_look)
    with open_checkpoint(tiny_llama) as checkpoint:
        digest, blocks = checkpoint.model_digest, checkpoint.block_count
    async with (
        peerd.open_peer(transport=network.transport("10.0.0.1"), listen=[first]) as bootstrap,
        peerd.open_peer(
            transport=network.transport("10.0.0.2"),
            listen=["/ip4/10.0.0.2/tcp/4000/ws"],
            bootstrap=[f"{first}/p2p/{bootstrap.peer_id}"],
            serve=[spec],
        ) as server,
    ):
        await server.serve(replace(spec, blocks=Span(1, 3)))
        with pytest.raises(CheckpointError):
            await server.serve(replace(spec, blocks=Span(0, 1), adapters=(("none", "/nowhere"),)))
        assert [str(served.span) for served in server.served] == ["0:4", "1:3"]
        assert server._spans is not None
        assert len(server._spans._slots) == 2, "the slot is free again"
    assert [{slot % 8: words for slot, words in one.items()} for one in seen] == [
        {0: "0:4 joining"},
        {0: "0:4 online", 1: "1:3 joining"},
        {0: "0:4 online", 1: "1:3 online", 2: "0:1 joining"},
    ]


@pytest.mark.real_time
async def test_a_host_without_memory_is_an_error_that_a_move_survives(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*arguments: Any) -> None:
        torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setattr(span_loader, "load", too_much)
    with open_checkpoint(tiny_llama) as checkpoint, pytest.raises(MemoryError, match="blocks 0:2 do not fit") as caught:
        await span_loader.load_served(peerd.ServeSpec(tiny_llama), checkpoint, Span(0, 2))
    assert isinstance(caught.value, LOAD_ERRORS)


def rebalancers(peer: peerd.Peer) -> int:
    """How many of the peer's spans move by themselves."""
    return sum(isinstance(mover, Rebalancer) for mover in peer._spans._movers)


@pytest.mark.real_time
async def test_only_a_span_that_nobody_named_on_one_device_moves(tiny_llama: Path) -> None:
    def spec(blocks: Span | int | None, **more: Any) -> peerd.ServeSpec:
        return peerd.ServeSpec(tiny_llama, blocks, kv_tokens=64, throughput=100.0, memory_bytes=2**30, **more)

    orders = {
        spec(Span(0, 4)): 0,
        spec(4): 1,
        spec(4, stay=True): 0,
        spec(4, device="cpu,cpu"): 0,
        # All blocks: there is nowhere to go.
        spec(None): 0,
    }
    listen = "/ip4/10.0.0.1/tcp/4000/ws"
    transport = MemoryNetwork().transport("10.0.0.1")
    async with peerd.open_peer(transport=transport, listen=[listen], serve=[spec(Span(0, 1))]) as peer:
        for order, moving in orders.items():
            before = rebalancers(peer)
            await peer.serve(order)
            assert rebalancers(peer) - before == moving, order
