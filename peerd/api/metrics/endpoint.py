"""Answers `/metrics`. Each daemon has a registry of its own: two in one process never share a figure."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route


class MetricsEndpoint:
    """`/metrics` with the figures of `collector`, and those of the process: memory, CPU time, open files."""

    def __init__(self, collector: Collector) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(collector)
        ProcessCollector(registry=self._registry)

    def routes(self) -> list[BaseRoute]:
        """The path at which Prometheus asks by default."""
        return [Route("/metrics", self.answer)]

    async def answer(self, request: Request) -> Response:
        """The figures in the format that the caller prefers: Prometheus' text, or OpenMetrics."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), headers={"Content-Type": content_type})
