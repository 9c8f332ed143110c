"""Traces of answers: a span for each, and in it one for each hop while it computes."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from peerd.cli.watching.traces import OpenTelemetry, open_traces
from peerd.client.answer_meter import AnswerMeter
from peerd.client.finding.served_by import ServedBy
from peerd.meters import Meters
from peerd.protocol.errors import InvalidRequest, NoChain
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span

FIRST = (ServedBy(PeerId("a"), Span(0, 4)), ServedBy(PeerId("b"), Span(4, 8)))
MENDED = (ServedBy(PeerId("a"), Span(0, 4)), ServedBy(PeerId("c"), Span(4, 8)))


@pytest.fixture
def finished() -> Any:
    """`finished.meters`: traced; `finished.spans()`: those that have ended."""
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = trace.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    meters = Meters()
    meters.traces = OpenTelemetry(provider)
    memory.meters = meters
    return memory


async def answer(meters: Meters, *chains: tuple[ServedBy, ...], error: Exception | None = None) -> None:
    meter = AnswerMeter(meters, None)
    with meter.running():
        for chain in chains:
            meter.token(0)
            meter.chain(lambda chain=chain: chain)  # type: ignore[misc]
        if error is not None:
            raise error


async def test_an_answer_is_a_span_with_one_for_each_hop(finished: Any) -> None:
    await answer(finished.meters, FIRST, FIRST, FIRST)
    *hops, whole = finished.get_finished_spans()
    assert (whole.name, whole.attributes["peerd.end"], whole.attributes["peerd.tokens"]) == ("answer", "complete", 3)
    named = [(hop.name, hop.attributes["peerd.peer"], hop.attributes["peerd.blocks"]) for hop in hops]
    assert named == [("hop", "a", "0:4"), ("hop", "b", "4:8")]
    assert all(hop.parent.span_id == whole.context.span_id for hop in hops)
    assert not any(hop.attributes["peerd.replaced"] for hop in hops)
    assert whole.status.is_unset


async def test_a_hop_s_part_of_the_prompt_is_a_span_of_its_own_in_the_past(finished: Any) -> None:
    meters = finished.meters
    trace = meters.traces.begin()
    trace.prompt(1, ("b", "4:8"), 3.0, 2.0)
    trace.end("complete", 0)
    prompt, whole = finished.get_finished_spans()
    assert (prompt.name, dict(prompt.attributes)) == (
        "prompt",
        {"peerd.hop": 1, "peerd.peer": "b", "peerd.blocks": "4:8"},
    )
    assert prompt.parent.span_id == whole.context.span_id
    assert (prompt.end_time - prompt.start_time) / 1e9 == pytest.approx(2.0)
    assert (whole.end_time - prompt.end_time) / 1e9 == pytest.approx(1.0, abs=0.5)


async def test_a_hop_that_is_replaced_ends_where_the_next_begins(finished: Any) -> None:
    await answer(finished.meters, FIRST, MENDED)
    spans = {span.attributes.get("peerd.peer"): span for span in finished.get_finished_spans()}
    assert spans["b"].attributes["peerd.replaced"]
    assert not spans["c"].attributes["peerd.replaced"]
    assert spans["b"].end_time <= spans["c"].start_time
    assert len([span for span in finished.get_finished_spans() if span.name == "hop"]) == 3


async def test_an_answer_that_fails_is_an_error_and_one_that_is_left_is_none(finished: Any) -> None:
    with pytest.raises(NoChain):
        await answer(finished.meters, FIRST, error=NoChain("gone"))
    with pytest.raises(RuntimeError):
        await answer(finished.meters, FIRST, error=RuntimeError("the caller's own"))
    failed, left = [span for span in finished.get_finished_spans() if span.name == "answer"]
    assert (failed.attributes["peerd.end"], failed.status.is_ok, failed.status.is_unset) == ("no_chain", False, False)
    assert (left.attributes["peerd.end"], left.status.is_unset) == ("abandoned", True)


async def test_without_traces_nobody_asks_for_the_chain() -> None:
    meter = AnswerMeter(Meters(), None)
    with meter.running():
        meter.chain(lambda: pytest.fail("it was asked"))


@pytest.mark.real_time
async def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'peerd\[traces\]'"):
        async with open_traces():
            pass
