"""Whole peers: the delays that clients and servers measure by themselves reach plans and announcements."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import trio

import peerd
from peerd.protocol.addresses import Multiaddr
from peerd.testing.network import MemoryNetwork

LATENCY_S = 0.02


def opened(network: MemoryNetwork, number: int, bootstrap: tuple[Multiaddr, ...], *serve: peerd.ServeSpec):
    ip = f"10.0.0.{number}"
    listen = [f"/ip4/{ip}/tcp/4000/ws"] if serve else []
    return peerd.open_peer(transport=network.transport(ip), listen=listen, bootstrap=bootstrap, serve=serve)


@pytest.mark.real_time
async def test_a_client_and_servers_measure_each_other_unasked(
    tiny_llama: Path, byte_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FIRST_ROUND_S", "ROUND_S", "MAX_AGE_S"):
        monkeypatch.setattr(f"peerd.spans.neighbours.{name}", 0.5)
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    byte_tokenizer.save_pretrained(tmp_path)
    network = MemoryNetwork(latency_s=LATENCY_S)
    halves = [
        peerd.ServeSpec(tmp_path, peerd.Span(*span), kv_tokens=256, throughput=100.0, memory_bytes=2**30, **more)
        for span, more in (((0, 5), {"uplink": 2_500_000}), ((5, 8), {}))
    ]
    async with (
        opened(network, 1, (), halves[0]) as first,
        opened(network, 2, first.addresses, halves[1]) as second,
        opened(network, 3, first.addresses) as client,
        client.model(tmp_path) as model,
    ):
        rtts_s = client.discovery.track_record.rtts_s()
        for server in (first, second):
            assert 2 * LATENCY_S <= rtts_s[server.peer_id] < 1
        async with model.session(max_length=16) as session:
            await session.step(torch.zeros(1, 32))
            assert [hop.peer for hop in session.chain] == [first.peer_id, second.peer_id]
        with trio.fail_after(30):
            while True:
                # Announcements are 20 s apart, unless something changes.
                first.discovery.announce_soon()
                await trio.sleep(0.5)
                offers = await client.discovery.directory.servers(model.facts.digest, 8, max_age_s=0.0)
                records = {offer.peer_id: offer.record for offer in offers}
                if records[first.peer_id].rtts:
                    break
        ((neighbour, rtt_s),) = records[first.peer_id].rtts
        assert neighbour == second.peer_id
        assert 2 * LATENCY_S <= rtt_s < 1
        assert records[first.peer_id].uplink == 2_500_000
        assert records[second.peer_id].rtts == ()
