"""Reads all figures of one daemon when Prometheus asks: from the rooms that have them, and from the peer's meters.

It runs on the event loop, where nothing changes meanwhile, and waits for nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, get_args

import trio
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from peerd import __version__
from peerd.api.metrics.families import FAMILIES
from peerd.meters import Histogram
from peerd.net.connection.peer_connection import Way
from peerd.routing.reach.verdict import Reach

if TYPE_CHECKING:
    from peerd.api.models import Models
    from peerd.api.openai.answering import Answering
    from peerd.api.web.history import History
    from peerd.peer import Peer

# Places are named in our code, but some with the name of a protocol: more than these are counted together.
MAX_PLACES = 32

Labelled = Mapping[tuple[str, ...], float]


class Figures(Collector):
    """The figures of one daemon."""

    def __init__(self, peer: Peer, models: Models, history: History, answering: Answering) -> None:
        self._peer = peer
        self._models = models
        self._history = history
        self._answering = answering
        self._opened = time.monotonic()

    def collect(self) -> Iterator[Metric]:
        """All families, each with its samples now."""
        values: dict[str, float | Labelled | Histogram] = {
            "peerd_build": {(__version__,): 1},
            "peerd_uptime_seconds": time.monotonic() - self._opened,
            **self._of_answers(),
            **self._of_serving(),
            **self._of_network(),
            **self._of_trouble(),
        }
        assert values.keys() == FAMILIES.keys()
        return (_metric(name, value) for name, value in values.items())

    def _of_answers(self) -> dict[str, float | Labelled | Histogram]:
        meters = self._peer.connections.meters
        samples = self._history.samples
        coverage = samples[-1].coverage if samples else {}
        return {
            "peerd_tokens": meters.tokens,
            "peerd_prompt_tokens": meters.prompt_tokens,
            "peerd_cached_tokens": meters.cached_tokens,
            "peerd_resting_tokens": sum(model.kept.positions for _, model in self._models if model.kept is not None),
            "peerd_answers": _one_label(meters.answers),
            "peerd_answering": self._answering.count,
            "peerd_first_token_seconds": meters.first_token_s,
            "peerd_between_tokens_seconds": meters.between_tokens_s,
            "peerd_speculation_drafted": meters.drafted,
            "peerd_speculation_accepted": meters.accepted,
            "peerd_failovers": meters.failovers,
            "peerd_hop_delay_seconds": meters.hop_delay_s,
            "peerd_audits": self._audits(),
            "peerd_coverage_ratio": _one_label(coverage),
        }

    def _of_serving(self) -> dict[str, float | Labelled | Histogram]:
        peer, meters = self._peer, self._peer.connections.meters
        engines = [served.task.engine for served in peer.served]
        free = sum(engine.free_tokens for engine in engines)
        total = sum(engine.total_tokens for engine in engines)
        return {
            "peerd_served_blocks": sum(len(served.span) for served in peer.served),
            "peerd_sessions": peer.server.sessions if peer.server is not None else 0,
            "peerd_kv_tokens": {("free",): free, ("used",): total - free},
            "peerd_steps": _one_label(meters.steps),
            "peerd_queued_seconds": meters.queued_s,
            "peerd_batch_sessions": meters.batch_sessions,
            "peerd_batch_positions": meters.batch_positions,
            "peerd_batch_seconds": meters.batch_s,
        }

    def _of_network(self) -> dict[str, float | Labelled | Histogram]:
        peer = self._peer
        ways = Counter(connection.way for connection in peer.connections.live.values())
        ledger = peer.relay.ledger if peer.relay is not None else None
        tensor_bytes = peer.connections.meters.tensor_bytes
        return {
            "peerd_tensor_bytes": {(codec, way): count for (codec, way), count in tensor_bytes.items()},
            "peerd_connected_peers": {(way,): ways[way] for way in get_args(Way)},
            "peerd_dht_contacts": len(peer.discovery.contacts()),
            "peerd_reach": {(reach.value,): reach is peer.reachability.reach for reach in Reach},
            "peerd_relays_used": len(peer.reservations.held) if peer.reservations is not None else 0,
            "peerd_relayed_peers": ledger.slots if ledger is not None else 0,
            "peerd_relayed_connections": ledger.circuits if ledger is not None else 0,
            "peerd_relayed_bytes": peer.relay.passed_bytes if peer.relay is not None else 0,
        }

    def _of_trouble(self) -> dict[str, float | Labelled | Histogram]:
        peer = self._peer
        containment = peer.connections.containment
        most = dict(containment.counts.most_common(MAX_PLACES))
        if rest := containment.counts.total() - sum(most.values()):
            most["other places"] = rest
        return {
            "peerd_avoided_peers": len(peer.discovery.track_record.avoidance()),
            "peerd_refused_peers": len(containment.scores.listed(trio.current_time())),
            "peerd_contained_bugs": _one_label(most),
        }

    def _audits(self) -> Labelled:
        counts: dict[tuple[str, ...], float] = {}
        for _, model in self._models:
            if (auditor := model.auditor) is None:
                continue
            hops = {f"hop {outcome}": count for outcome, count in auditor.replay_counts.items()}
            for outcome, count in (auditor.counts | hops).items():
                counts[(outcome,)] = counts.get((outcome,), 0) + count
        return counts


def _one_label(values: Mapping[str, float]) -> Labelled:
    return {(label,): value for label, value in values.items()}


def _metric(name: str, value: float | Labelled | Histogram) -> Metric:
    family = FAMILIES[name]
    if isinstance(value, Histogram):
        return HistogramMetricFamily(name, family.help, buckets=_buckets(value), sum_value=value.total)
    make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric: Metric = make(name, family.help, labels=family.labels)
    samples: Iterable[tuple[tuple[str, ...], float]] = value.items() if isinstance(value, Mapping) else (((), value),)
    for labels, number in samples:
        metric.add_metric(labels, number)  # type: ignore[attr-defined]
    return metric


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Each bucket counts what is at most its bound, so the counts of smaller ones are added."""
    bounds = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))
