"""OpenTelemetry traces of a daemon's answers: a span for each answer, and in it spans for what each hop computes.

Where they go is said by OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_ENDPOINT and the like). They hold PeerIds,
blocks, times and how answers ended, and nothing of what was asked or answered.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from peerd.protocol.errors import InvalidRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

# What is not sent by then is lost; the daemon's user waits.
_FLUSH_S = 5.0
_GOOD_ENDS = ("complete", "abandoned")


class AnswerSpans:
    """The spans of one answer."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._answer = tracer.start_span("answer")
        self._serving: Sequence[tuple[str, str]] = ()
        self._hops: dict[tuple[int, str, str], Span] = {}

    def serving(self, hops: Sequence[tuple[str, str]]) -> None:
        """Begin a span for each hop that is new, and end those of hops that were replaced."""
        if hops == self._serving:
            return
        self._serving = hops
        now = [(number, peer, blocks) for number, (peer, blocks) in enumerate(hops)]
        for gone in self._hops.keys() - set(now):
            self._end_hop(gone, replaced=True)
        for hop in now:
            if hop not in self._hops:
                number, peer, blocks = hop
                self._hops[hop] = self._begin("hop", number, (peer, blocks))

    def prompt(self, number: int, hop: tuple[str, str], ago_s: float, took_s: float) -> None:
        """Note a span for a hop's part of a prompt, which lies in the past."""
        began = time.time_ns() - round(1e9 * ago_s)
        self._begin("prompt", number, hop, began).end(began + round(1e9 * took_s))

    def end(self, how: str, tokens: int) -> None:
        """End all spans."""
        from opentelemetry.trace import Status, StatusCode

        for hop in list(self._hops):
            self._end_hop(hop, replaced=False)
        self._answer.set_attributes({"peerd.end": how, "peerd.tokens": tokens})
        if how not in _GOOD_ENDS:
            self._answer.set_status(Status(StatusCode.ERROR, how))
        self._answer.end()

    def _begin(self, name: str, number: int, hop: tuple[str, str], at_ns: int | None = None) -> Span:
        from opentelemetry.trace import set_span_in_context

        named: dict[str, str | int] = {"peerd.hop": number, "peerd.peer": hop[0], "peerd.blocks": hop[1]}
        context = set_span_in_context(self._answer)
        return self._tracer.start_span(name, context=context, attributes=named, start_time=at_ns)

    def _end_hop(self, hop: tuple[int, str, str], *, replaced: bool) -> None:
        span = self._hops.pop(hop)
        span.set_attribute("peerd.replaced", replaced)
        span.end()


class OpenTelemetry:
    """Begins a trace for each answer."""

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer("peerd")

    def begin(self) -> AnswerSpans:
        return AnswerSpans(self._tracer)


@asynccontextmanager
async def open_traces() -> AsyncIterator[OpenTelemetry]:
    """Send traces until the block ends. Raises InvalidRequest if the packages are missing."""
    try:
        provider = await trio.to_thread.run_sync(_provider)
    except ImportError as error:
        raise InvalidRequest(f"--traces needs more packages ({error.name}): pip install 'peerd[traces]'") from None
    try:
        yield OpenTelemetry(provider)
    finally:
        with trio.move_on_after(_FLUSH_S, shield=True):
            await trio.to_thread.run_sync(provider.shutdown, abandon_on_cancel=True)


def _provider() -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # OTEL_SERVICE_NAME, if it is set, counts more.
    provider = TracerProvider(resource=Resource.create({"service.name": "peerd"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
