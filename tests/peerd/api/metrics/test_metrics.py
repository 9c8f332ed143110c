"""`/metrics` as Prometheus reads it, its names, and the dashboard that uses them."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import trio
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from peerd.api.metrics.collector import MAX_PLACES, Figures
from peerd.api.metrics.endpoint import MetricsEndpoint
from peerd.api.metrics.families import FAMILIES
from peerd.api.models import Models
from peerd.api.openai.answering import Answering
from peerd.api.web.history import History, Sample
from peerd.meters import Meters
from peerd.net.containment import Containment
from peerd.peer import Peer
from peerd.protocol.identity import PeerId
from tests.fakes.api_fixture import TOKEN
from tests.fakes.reach_fixture import server_record, world

DASHBOARD = Path(__file__).parents[4] / "contrib/grafana/peerd.json"


def figures_of(peer: Peer, history: History | None = None) -> dict[str, dict[tuple[str, ...], float]]:
    """Each sample's value by its labels' values, by name, as Prometheus parses them."""
    endpoint = MetricsEndpoint(Figures(peer, Models({}), history or History(), Answering()))
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(generate_latest(endpoint._registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


async def test_every_family_of_the_table_is_answered_and_no_other() -> None:
    async with world() as around:
        (peer,) = await around.internet(1)
        meters = peer.connections.meters
        meters.answers["complete"] = meters.steps["computed"] = meters.tensor_bytes["exact", "sent"] = 1
        peer.connections.containment.counts["a place: KeyError"] = 1
        history = History()
        history._samples.append(Sample(0.0, 1, {"smol": 0.5}))
        endpoint = MetricsEndpoint(Figures(peer, Models({}), history, Answering()))
        families = {family.name: family for family in endpoint._registry.collect()}
        ours = {name for name in families if name.startswith("peerd_")}
        assert ours == FAMILIES.keys()
        for name in ours:
            assert families[name].type == FAMILIES[name].kind
            assert families[name].documentation == FAMILIES[name].help
            assert {sample.name for sample in families[name].samples} <= FAMILIES[name].samples
            labels = {tuple(key for key in sample.labels if key != "le") for sample in families[name].samples}
            assert labels <= {FAMILIES[name].labels}


async def test_strangers_add_no_samples() -> None:
    async with world() as around:
        peer, *_ = await around.internet(1)
        before = {name: set(samples) for name, samples in figures_of(peer).items()}
        for number in range(1, 4):
            stranger = await around.open(f"5.{number}.9.9")
            await stranger.connections.connect(peer.peer_id, peer.addresses)
        for number in range(200):
            peer.connections.containment.scores.note("did wrong", 1.0, PeerId(f"stranger {number}"), None, 0.0)
        after = figures_of(peer)
        assert {name: set(samples) for name, samples in after.items()} == before
        assert after["peerd_connected_peers"]["direct",] == 3


async def test_places_of_bugs_beyond_a_number_are_counted_together() -> None:
    async with world() as around:
        (peer,) = await around.internet(1)
        counts = Counter({f"place {number}": number for number in range(1, 100)})
        peer.connections.containment.counts.update(counts)
        bugs = figures_of(peer)["peerd_contained_bugs_total"]
        assert len(bugs) == MAX_PLACES + 1
        assert sum(bugs.values()) == counts.total()
        assert bugs["place 99",] == 99


async def test_a_server_shows_its_spans_and_their_memory() -> None:
    async with world() as around:
        (peer,) = await around.internet(1)
        engine = SimpleNamespace(free_tokens=30, total_tokens=100)
        served = SimpleNamespace(span=server_record().span, task=SimpleNamespace(engine=engine))
        peer.server = SimpleNamespace(spans=(served, served), sessions=3)  # type: ignore[assignment]
        found = figures_of(peer)
        peer.server = None
        assert found["peerd_kv_tokens"] == {("free",): 60, ("used",): 140}
        assert found["peerd_served_blocks"][()] == 2 * len(served.span)
        assert found["peerd_sessions"][()] == 3


async def test_buckets_are_cumulative() -> None:
    async with world() as around:
        (peer,) = await around.internet(1)
        for value in (0.003, 0.3, 0.3, 1000.0):
            peer.connections.meters.batch_s.observe(value)
        found = figures_of(peer)
        buckets = found["peerd_batch_seconds_bucket"]
        assert (buckets["0.0025",], buckets["0.005",], buckets["0.5",], buckets["+Inf",]) == (0, 1, 3, 4)
        assert found["peerd_batch_seconds_count"][()] == 4
        assert found["peerd_batch_seconds_sum"][()] == pytest.approx(1000.603)


def test_two_daemons_in_one_process_share_nothing() -> None:
    assert Meters().tensor_bytes is not Meters().tensor_bytes
    assert Containment().counts is not Containment().counts


@pytest.mark.real_time
async def test_prometheus_reads_it_with_the_token_only(open_daemon) -> None:
    async with open_daemon() as daemon:

        def use():
            body = {"model": "bytes", "prompt": [1, 2, 3], "max_tokens": 6, "temperature": 0}
            bearer = {"Authorization": f"Bearer {TOKEN}"}
            httpx.post(f"{daemon.url}/v1/completions", json=body, headers=bearer).raise_for_status()
            plain = httpx.get(f"{daemon.url}/metrics", headers=bearer)
            open_metrics = httpx.get(
                f"{daemon.url}/metrics", headers=bearer | {"Accept": "application/openmetrics-text; version=1.0.0"}
            )
            return httpx.get(f"{daemon.url}/metrics"), plain, open_metrics

        refused, plain, open_metrics = await trio.to_thread.run_sync(use)
    assert refused.status_code == 401
    assert plain.headers["content-type"].startswith("text/plain; version=")
    assert "process_resident_memory_bytes " in plain.text
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
    assert open_metrics.text.endswith("# EOF\n")


async def test_an_answer_through_a_swarm_is_counted_at_both_ends(open_byte_model) -> None:
    async with open_byte_model() as (model, swarm):
        generation = model.generate("ab", max_new_tokens=5, temperature=0)
        async for _ in generation:
            pass
        meters = model.meters
        assert meters.tokens == len(generation.token_ids)
        assert sum(meters.first_token_s.counts) == 1
        assert meters.answers["complete"] == 1
        assert meters.failovers == 0
        sent, received = meters.tensor_bytes["exact", "sent"], meters.tensor_bytes["exact", "received"]
        assert sent > 0
        assert received > 0
        served = [host.server._meters for host in swarm.hosts]
        assert all(each.steps["computed"] and sum(each.queued_s.counts) for each in served)
        assert all(each.steps["failed"] == 0 for each in served)
        assert sum(each.tensor_bytes["exact", "sent"] for each in served) > received
        assert served[0].tensor_bytes["exact", "received"] == sent


def test_the_dashboard_uses_names_and_labels_that_exist() -> None:
    names = {sample: family for family in FAMILIES.values() for sample in family.samples}
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(expressions) > 20
    used = set()
    for expression in expressions:
        for name in re.findall(r"\b(peerd_\w+)", expression):
            assert name in names, f"{name} in {expression}"
            used.add(names[name].name)
        for others in re.findall(r"\bprocess_\w+", expression):
            assert others in ("process_resident_memory_bytes", "process_cpu_seconds_total")
    assert used == FAMILIES.keys(), "each figure is on the dashboard"


def test_what_a_legend_names_is_a_label_of_its_query() -> None:
    names = {sample: family for family in FAMILIES.values() for sample in family.samples}
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) - {"instance"}
            (family, *_) = [names[name] for name in re.findall(r"\b(peerd_\w+)", target["expr"])] or [None]
            assert wanted <= set(family.labels if family else ()), target


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    cells: Counter[tuple[int, int]] = Counter()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells.update((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"]))
        assert at["x"] + at["w"] <= 24
    assert max(cells.values()) == 1
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
