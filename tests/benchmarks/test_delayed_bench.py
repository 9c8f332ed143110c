"""The delayed bench's own measuring, with a tiny model behind real proxies."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

import peerd
from benchmarks.swarms.delayed_bench import Chained, Figure, HubAndSpoke, Turn, failures, measure_way
from benchmarks.swarms.delayed_link import free_port
from benchmarks.swarms.delayed_swarm import DelayedSwarm, open_proxies
from peerd.cli.demo import even_spans

RTT_MS = 200.0
WIDTH_BYTES = 64 * 4
# Headers, frames and what they are wrapped in.
MOST_EXTRA_BYTES = 200


@pytest.mark.real_time
async def test_a_chain_crosses_each_link_once_and_a_hub_carries_everything_back_and_forth(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two servers: three one-way delays a token round the chain, four by hub and spoke."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spans = even_spans(6, 2)
    ports = [free_port() for _ in spans]
    async with AsyncExitStack() as stack:
        proxies = await stack.enter_async_context(open_proxies(ports))
        bootstrap: tuple[peerd.Multiaddr, ...] = ()
        for span, port, proxy in zip(spans, ports, proxies.ports, strict=True):
            server = await stack.enter_async_context(
                peerd.open_peer(
                    listen=[f"/ip4/127.0.0.1/tcp/{port}/ws"],
                    announce=[f"/ip4/127.0.0.1/tcp/{proxy}/ws"],
                    serve=[peerd.ServeSpec(tiny_model, span, kv_tokens=512, throughput=1000)],
                    bootstrap=bootstrap,
                )
            )
            bootstrap = bootstrap or server.addresses
        client = await stack.enter_async_context(peerd.open_peer(bootstrap=bootstrap))
        model = await stack.enter_async_context(client.model(tiny_model))
        swarm = DelayedSwarm(SimpleNamespace(), (SimpleNamespace(),) * 2, tuple(spans), proxies)  # type: ignore[arg-type]
        chain, hub = [
            (await measure_way(way, model, swarm, turns=3, tokens=3, rtts_ms=(0.0, RTT_MS)))[1]
            for way in (Chained, HubAndSpoke)
        ]
    one_way_s = RTT_MS / 2000
    for figure, links in ((chain, 3), (hub, 4)):
        assert len(figure.links_s) == links
        assert all(link_s >= one_way_s for link_s in figure.links_s)
        assert figure.token_s >= links * one_way_s
        assert links * WIDTH_BYTES < figure.link_bytes < links * (WIDTH_BYTES + MOST_EXTRA_BYTES)
    assert chain.token_s < hub.token_s


def test_what_a_token_should_take_is_reckoned_in_its_own_turn() -> None:
    """The machine slows down to half of its speed after the first turn; what is shown is not another link."""
    still = [Turn(0.010, (0.0,), 0), Turn(0.020, (0.0,), 0), Turn(0.020, (0.0,), 0)]
    turns = [Turn(0.110, (0.100,), 0), Turn(0.120, (0.100,), 0), Turn(0.144, (0.100,), 0)]
    figure = Figure.of("chain", 1, 100.0, turns, still)
    assert figure.ratio == pytest.approx(1.0)
    assert failures([figure]) == []
    late = Figure.of("chain", 1, 100.0, [Turn(0.140, (0.100,), 0)], still[1:2])
    assert failures([late]) == ["chain of 1 at 100 ms took 1.17 of what it should"]
    unmeasured = Figure.of("chain", 1, 100.0, [Turn(0.140, (float("nan"),), 0)], still[:1])
    assert len(failures([unmeasured])) == 1
