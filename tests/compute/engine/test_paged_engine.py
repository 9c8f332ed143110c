"""An engine that attends for all rows at once and decodes in fixed buffers, compared with one that goes row by row.

Both get the same steps. On a machine with a GPU the first runs there, and its decodes are recorded; without one nothing
is recorded, but buffers, padding and page tables are the same. The second always runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine import decode_graph
from peerd.compute.engine.decode_graph import LENGTH_BUCKETS, ROW_BUCKETS, GraphShape
from peerd.compute.engine.engine import Engine
from peerd.compute.families.lookup import FAMILIES
from peerd.compute.model.span_model import load_span
from peerd.compute.steps import EngineStep
from peerd.protocol.rows import Fork, Op, RowSlice, SessionSize
from peerd.protocol.span import Span
from tests.compute.tiny_families import VARIANTS, tiny_model

SPAN = Span(1, 6)
WIDTH = 32
PAGE = 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Another device adds up in another order.
TOLERANCE = 1e-4 if DEVICE == "cpu" else 1e-3


# Its frequencies depend on what a session declares: more than 32 positions or not.
LONG = {
    "phi3 of long contexts": (
        "phi3",
        {
            "head_dim": 8,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 3.0, 5.0, 8.0],
            },
        },
    )
}


class Pair:
    """A paged engine and a plain one, over the same blocks."""

    def __init__(self, path: Path, device: str = DEVICE, **settings: int) -> None:
        self.engines = []
        for paged in (True, False):
            with open_checkpoint(path) as checkpoint:
                model = load_span(checkpoint, SPAN, device=device if paged else "cpu", attention=register_attention())
            engine = Engine(
                model, paged=paged, **{"kv_tokens": 1024, "page_tokens": PAGE, "batch_tokens": 64} | settings
            )
            for stored in (*engine._runner._pool.keys, *engine._runner._pool.values):
                # Slots that were never written must not matter.
                stored.fill_(torch.nan)
            self.engines.append(engine)
        self._generator = torch.Generator().manual_seed(3)
        self._seq = 0

    @property
    def graphs(self):
        return self.engines[0]._runner._graphs

    @property
    def buckets(self) -> set[GraphShape]:
        return set(self.graphs._recorded)

    def open(self, session: str, rows: int = 1, length: int = 64, blocks: Span = SPAN) -> None:
        for engine in self.engines:
            engine.open(session, SessionSize(length, max_rows=rows, max_rollback=length), blocks=blocks)

    def step(self, *asked: tuple[str, Sequence[RowSlice], Sequence[Op]]) -> None:
        """Submit steps of several sessions at once, run all batches, and compare."""
        results: list[dict] = [{}, {}]
        self._seq += 1
        for session, rows, ops in asked:
            hidden = torch.randn(sum(row.count for row in rows), WIDTH, generator=self._generator)
            for engine in self.engines:
                engine.submit(EngineStep(session, self._seq, tuple(ops), tuple(rows), hidden))
        for engine, found in zip(self.engines, results, strict=True):
            while batch := engine.plan():
                for result in engine.collect(batch, engine.run(batch)):
                    assert result.error is None, result.error
                    found[result.session] = result.hidden
        assert results[0].keys() == results[1].keys() == {session for session, _, _ in asked}
        for session, hidden in results[0].items():
            torch.testing.assert_close(hidden, results[1][session], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture
def make_pair(tmp_path: Path) -> Callable[..., Pair]:
    def make(name: str = "llama", **settings: Any) -> Pair:
        family, fields = (VARIANTS | LONG).get(name, (name, None))
        tiny_model(FAMILIES[family], fields).save_pretrained(tmp_path)
        return Pair(tmp_path, **settings)

    return make


def one(session: str, start: int, count: int = 1) -> tuple[str, list[RowSlice], list[Op]]:
    return session, [RowSlice(0, start, count)], []


# Grouped heads; windows in some blocks; softcap; sinks, experts; windows everywhere; declared lengths; chunks; ALiBi.
@pytest.mark.parametrize(
    "family",
    [
        *("llama", "qwen3", "gemma2", "gpt_oss", "mistral", "llama4_text", "bloom", "falcon with alibi", "mpt"),
        *("phi3 of long contexts", "granite_swa with dynamic ropes"),
    ],
)
def test_decodes_beside_prefills_equal_those_of_the_plain_engine(make_pair, family: str):
    pair = make_pair(family)
    for session, length in (("a", 5), ("b", 23), ("c", 1)):
        pair.open(session, length=30 if session == "c" else 64)
        pair.step(one(session, 0, length))
    for turn in range(3):
        pair.step(one("a", 5 + turn), one("b", 23 + turn), one("c", 1 + turn))
    pair.open("late")
    # A prefill in chunks beside decodes, then all sessions decode.
    pair.step(one("late", 0, 40), one("a", 8), one("b", 26))
    pair.step(one("late", 40), one("a", 9), one("b", 27), one("c", 4))
    # A GPU cannot record all of them.
    assert pair.graphs._refused or {bucket.rows for bucket in pair.buckets} >= {1, 4}
    assert DEVICE == "cuda" or not pair.graphs._refused


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rollbacks_forks_and_speculation_need_no_more_than_other_numbers(make_pair, family: str):
    pair = make_pair(family)
    pair.open("beams", rows=3)
    pair.open("guess")
    pair.step(one("beams", 0, 10))
    pair.step(one("guess", 0, 18))
    made = pair.buckets
    fork = [Fork(0, 1, 10), Fork(0, 2, 9)]
    pair.step(("beams", [RowSlice(0, 10, 1), RowSlice(1, 10, 1), RowSlice(2, 9, 1)], fork), one("guess", 18, 4))
    # Three of the guesses were wrong; then a beam takes another's place.
    pair.step(("beams", [RowSlice(0, 11, 1), RowSlice(1, 11, 1)], []), one("guess", 19))
    pair.step(("beams", [RowSlice(2, 11, 1)], [Fork(0, 2, 11)]), one("guess", 15, 2))
    assert {bucket.rows for bucket in pair.buckets - made} == {4, 8}


def test_a_batch_takes_the_smallest_bucket_and_buckets_are_made_once(make_pair):
    pair = make_pair(kv_tokens=4096)
    names = [f"s{number}" for number in range(9)]
    for name in names:
        pair.open(name)
        pair.step(one(name, 0, 12))
    assert not pair.buckets
    for count in (1, 2, 3, 9, 9):
        # Each time one position back: a bucket is not made for where rows stand.
        pair.step(*(one(name, 12) for name in names[:count]))
    width = LENGTH_BUCKETS[0] // PAGE
    assert pair.buckets == {GraphShape(SPAN, rows, width) for rows in (1, 2, 4, 16)}


def test_a_row_longer_than_a_bucket_takes_the_next(make_pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("peerd.compute.engine.decode_graph.LENGTH_BUCKETS", (16, 32))
    pair = make_pair()
    pair.open("a")
    pair.step(one("a", 0, 14))
    for position in range(14, 36):
        pair.step(one("a", position))
    assert {bucket.width for bucket in pair.buckets} == {4, 8, 9}


def test_sessions_on_a_part_of_the_span_have_buckets_of_their_own(make_pair):
    pair = make_pair()
    for session, blocks in (("part", Span(2, 4)), ("whole", SPAN)):
        pair.open(session, blocks=blocks)
        pair.step(one(session, 0, 10))
        pair.step(one(session, 10))
    assert {bucket.blocks for bucket in pair.buckets} == {Span(2, 4), SPAN}


def test_more_rows_than_the_largest_bucket_are_attended_for_without_one(make_pair):
    count = ROW_BUCKETS[-1] + 1
    pair = make_pair(kv_tokens=4096, batch_tokens=2 * count)
    pair.open("crowd", rows=count, length=16)
    pair.step(("crowd", [RowSlice(row, 0, 1) for row in range(count)], []))
    pair.step(("crowd", [RowSlice(row, 1, 1) for row in range(count)], []))
    assert not pair.buckets


def test_blocks_that_cannot_be_recorded_are_tried_once_and_run_as_before(make_pair, monkeypatch: pytest.MonkeyPatch):
    pair = make_pair()
    tried = []
    monkeypatch.setattr(pair.graphs, "_make", lambda bucket: tried.append(bucket))
    pair.open("a")
    pair.step(one("a", 0, 10))
    for position in range(10, 13):
        pair.step(one("a", position))
    assert len(tried) == 1


def test_a_bucket_that_fails_leaves_the_others_and_is_tried_again(make_pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode_graph, "RETRY_AFTER", 2)
    pair = make_pair()
    make, tried = pair.graphs._make, []

    def without_memory_for_two(bucket: GraphShape):
        tried.append(bucket.rows)
        return None if bucket.rows == 2 and tried.count(2) < 2 else make(bucket)

    monkeypatch.setattr(pair.graphs, "_make", without_memory_for_two)
    for session in "ab":
        pair.open(session)
        pair.step(one(session, 0, 10))
    pair.step(one("a", 10), one("b", 10))
    pair.step(one("a", 11))
    assert {bucket.rows for bucket in pair.buckets} == {1}
    for position in range(12, 15):
        pair.step(one("a", position), one("b", position - 1))
    assert tried == [2, 1, 2]
    assert {bucket.rows for bucket in pair.buckets} == {1, 2}


def test_what_has_not_run_for_longest_makes_room_for_other_parts(make_pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode_graph, "MOST_RECORDED", 2)
    pair = make_pair()
    parts = [Span(SPAN.start, SPAN.end), Span(SPAN.start, SPAN.end - 1), Span(SPAN.start + 1, SPAN.end)]
    for number, blocks in enumerate(parts[:2]):
        pair.open(str(number), blocks=blocks)
        pair.step(one(str(number), 0))
    pair.step(one("0", 1))
    pair.open("2", blocks=parts[2])
    pair.step(one("2", 0))
    assert {bucket.blocks for bucket in pair.buckets} == {parts[0], parts[2]}
    pair.step(one("1", 1))


def asked_of_the_device(pair: Pair) -> list[str]:
    pair.open("a")
    pair.step(one("a", 0, 10))
    pair.step(one("a", 10))
    ((bucket, recorded),) = pair.graphs._recorded.items()
    with torch.inference_mode():
        return pair.graphs.waits_for(bucket.blocks, recorded)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "llama4_text", "bloom", *LONG])
def test_a_decode_asks_the_device_for_nothing(make_pair, family: str):
    """So a GPU can record it; experts too, as Transformers runs them."""
    assert asked_of_the_device(make_pair(family, device="cpu")) == []


@pytest.mark.parametrize(
    ("family", "waits"), [("dbrx", "aten.nonzero"), ("granite_swa with dynamic ropes", "aten._unique")]
)
def test_blocks_that_look_at_numbers_do_ask_it(make_pair, family: str, waits: str):
    """Which experts are hit, and how long sessions may become: a GPU runs such decodes without recording them."""
    assert asked_of_the_device(make_pair(family, device="cpu")) == [waits]


def test_not_a_number_in_one_row_stays_there(make_pair):
    pair = make_pair()
    engine = pair.engines[0]
    for session in ("good", "bad"):
        engine.open(session, SessionSize(16, max_rollback=16))
    hidden = torch.randn(3, WIDTH)
    results = {}
    for poison in (False, True):
        for session in ("good", "bad"):
            own = hidden[:1] if session == "good" or not poison else torch.full((1, WIDTH), torch.nan)
            engine.submit(EngineStep(session, 1, (), (RowSlice(0, 0, 1),), own))
        while batch := engine.plan():
            for result in engine.collect(batch, engine.run(batch)):
                results[result.session, poison] = result
    assert results["bad", True].error is not None
    torch.testing.assert_close(results["good", True].hidden, results["good", False].hidden)
    # Nor does it stay in the buffers.
    engine.submit(EngineStep("good", 2, (), (RowSlice(0, 1, 1),), hidden[1:2]))
    batch = engine.plan()
    (result,) = engine.collect(batch, engine.run(batch))
    assert result.error is None
