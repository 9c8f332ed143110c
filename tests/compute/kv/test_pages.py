"""Pages: exact accounting, and rows that never see each other's writes, whatever the order of operations."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

from peerd.compute.errors import NoRoomError
from peerd.compute.kv import layout as kv_layout
from peerd.compute.kv.layout import EVERYTHING, Demand, Keep, rollback_room
from peerd.compute.kv.page_pool import PagePool
from peerd.compute.kv.page_table import PageStock, PageTable
from peerd.compute.kv.reserve import PageReserve
from peerd.compute.steps import EngineStep, StepResult
from peerd.protocol.rows import Drop, Fork, RowSlice, SessionSize
from peerd.protocol.span import Span
from peerd.testing.fake_engine import FakeEngine, fake_forward

SIZE = 4


def take(pool: PagePool, rows: int, pages_per_row: int) -> PageStock:
    return PageReserve(pool, rows, [Demand(EVERYTHING, 1, pages_per_row)]).stocks[0]


def pages_of(table: PageTable) -> Sequence[int]:
    (row,) = table.snapshot()
    assert row.first == 0
    return row.pages


def test_a_row_alone_lies_side_by_side():
    pool = PagePool(10, SIZE)
    stock = take(pool, 2, 5)
    tables = [PageTable(stock, row) for row in range(2)]
    for _ in range(20):
        for table in tables:
            table.grow(1)
    assert [pages_of(table) for table in tables] == [range(0, 5), range(5, 10)]


def test_a_fragmented_pool_still_grants_all_its_pages():
    pool = PagePool(6, SIZE)
    reserves = [PageReserve(pool, 1, [Demand(EVERYTHING, 1, 1)]) for _ in range(6)]
    for reserve in reserves:
        PageTable(reserve.stocks[0], 0).grow(SIZE)
    for reserve in reserves[::2]:
        reserve.close()
    with pytest.raises(NoRoomError) as refusal:
        take(pool, 2, 2)
    assert refusal.value.free_tokens == 3 * SIZE
    table = PageTable(take(pool, 1, 3), 0)
    table.grow(3 * SIZE)
    assert pages_of(table) == (0, 2, 4)
    assert pool.free_tokens == pool.free_pages == 0


def test_a_session_counts_with_twice_what_it_has_had_and_at_most_with_what_it_asked_for():
    pool = PagePool(20, SIZE)
    reserve = PageReserve(pool, 1, [Demand(EVERYTHING, 1, 10)])
    assert reserve.tokens == 10 * SIZE  # it has not said how it begins
    table = PageTable(reserve.stocks[0], 0)
    table.grow(1)
    assert reserve.tokens == 2 * SIZE
    table.grow(3 * SIZE)
    assert reserve.tokens == 8 * SIZE
    table.cut(1)
    assert (reserve.tokens, pool.free_tokens, pool.free_pages) == (8 * SIZE, 12 * SIZE, 19)
    table.grow(8 * SIZE)
    assert reserve.tokens == 10 * SIZE
    begun = PageReserve(pool, 1, [Demand(EVERYTHING, 1, 10)], begins_with=3)
    assert begun.tokens == 6 * SIZE
    PageTable(begun.stocks[0], 0).grow(1)
    assert begun.tokens == 6 * SIZE


def test_a_row_finds_its_home_in_the_end_of_another_that_is_long_and_little_used():
    pool = PagePool(16, SIZE)
    first = PageTable(take(pool, 1, 16), 0)
    first.grow(2 * SIZE)
    second = PageTable(take(pool, 1, 6), 0)
    second.grow(6 * SIZE)
    first.grow(8 * SIZE)
    assert (pages_of(first), pages_of(second)) == (range(10), range(10, 16))


def test_forked_rows_share_pages_until_one_writes():
    stock = take(PagePool(8, SIZE), 2, 4)
    source, target = PageTable(stock, 0), PageTable(stock, 1)
    source.grow(10)
    target.become(source, 10)
    assert stock.used_pages == 3
    (copy,) = target.grow(1)
    assert copy.source == pages_of(source)[2]
    assert pages_of(target)[:2] == tuple(pages_of(source)[:2])
    assert stock.used_pages == 4
    # No other row has the page any more, so its owner writes in place.
    assert source.grow(1) == []


def test_a_row_that_keeps_its_end_goes_round_its_home():
    stock = take(PagePool(9, SIZE), 2, 4)
    table = PageTable(stock, 1)
    table.grow(4 * SIZE)
    table.forget_before(2 * SIZE + 1)
    assert [(row.first, row.pages) for row in table.snapshot()] == [(2 * SIZE, range(2, 4))]
    table.grow(SIZE)
    assert [(row.first, row.pages) for row in table.snapshot()] == [(2 * SIZE, (2, 3, 0))]
    assert stock.used_pages == 3
    table.cut(0)
    assert stock.used_pages == 0


def test_every_group_has_pages_of_its_own():
    pool = PagePool(6, SIZE, groups=3)
    reserve = PageReserve(pool, 2, [Demand(EVERYTHING, 1, 4), Demand(Keep(window=3), 2, 2)])
    # Sixteen pages are six sets of three, two of which stay unused.
    assert pool.free_tokens == 0
    rows = [[PageTable(stock, row) for stock in reserve.stocks] for row in range(2)]
    for row in rows:
        for table in row:
            assert table.pages_to_grow(2 * SIZE) == 2 * len(table.snapshot())
            table.grow(2 * SIZE)
    pages = [page for row in rows for table in row for group in table.snapshot() for page in group.pages]
    assert len(set(pages)) == len(pages) == 12 == reserve.used_pages == 18 - pool.free_pages
    reserve.close()
    assert pool.free_tokens == pool.total_tokens == 6 * SIZE
    assert pool.free_pages == 18


@pytest.mark.parametrize("reach", [None, 7])
def test_ten_thousand_forks_cuts_and_writes_keep_rows_apart(reach: int | None):
    chance = random.Random(1)
    rows, longest = 5, 30
    pool = PagePool(64, SIZE)
    # Of a row with a reach no more than that is kept before what is added at once.
    reserve = PageReserve(pool, rows, [Demand(EVERYTHING, 1, 8 if reach is None else 2 + -(-reach // SIZE))])
    stock = reserve.stocks[0]
    tables = [PageTable(stock, row) for row in range(rows)]
    expected: list[list[int]] = [[] for _ in range(rows)]
    kept_from = [0] * rows
    memory: dict[int, list[int]] = {page: [0] * SIZE for page in range(64)}
    for stamp in range(10_000):
        row, other = chance.randrange(rows), chance.randrange(rows)
        table = tables[row]
        match chance.choice(["grow", "grow", "cut", "fork"]):
            case "grow":
                count = chance.randint(0, min(longest - table.length, SIZE))
                start, unused = table.length, pool.free_pages
                foretold = table.pages_to_grow(count)
                copies = table.grow(count)
                assert foretold == unused - pool.free_pages
                for copy in copies:
                    memory[copy.target] = list(memory[copy.source])
                (lies,) = table.snapshot()
                for position in range(start, table.length):
                    page, within = divmod(position - lies.first, SIZE)
                    memory[lies.pages[page]][within] = stamp
                expected[row] += [stamp] * count
            case "cut":
                length = chance.choice([0, chance.randint(kept_from[row], table.length)])
                table.cut(length)
                kept_from[row] = kept_from[row] if length else 0
                del expected[row][length:]
            case "fork":
                length = chance.randint(kept_from[other], tables[other].length)
                table.become(tables[other], length)
                kept_from[row] = kept_from[other] if length else 0
                expected[row] = expected[other][:length]
        if reach is not None:
            kept_from[row] = max(kept_from[row], table.length - reach)
            table.forget_before(kept_from[row])
        for table, row_expected in zip(tables, expected, strict=True):
            (lies,) = table.snapshot()
            seen = [value for page in lies.pages for value in memory[page]]
            assert seen[: table.length - lies.first] == row_expected[lies.first :]
        assert stock.used_pages == len({page for table in tables for page in table.snapshot()[0].pages})
    reserve.close()
    assert pool.free_tokens == pool.total_tokens
    assert pool.free_pages == 64


class _Shadow:
    """What a session should hold."""

    def __init__(self, size: SessionSize) -> None:
        self.max_rows = size.max_rows
        self.max_length = size.max_length
        self.back = rollback_room(size.max_rollback)
        self.rows: dict[int, torch.Tensor] = {}
        # How long each row has ever been since it last began.
        self.longest: dict[int, int] = {}
        # By step: its result, and the rows as they are where it fails.
        self.awaited: dict[int, tuple[torch.Tensor, dict[int, torch.Tensor]]] = {}

    def row(self, row: int) -> torch.Tensor:
        return self.rows.get(row, torch.zeros(0, 2))

    def a_cut(self, chance: random.Random, row: int) -> int:
        """A length at which the row may be cut."""
        length = len(self.row(row))
        return chance.choice(
            [0, length, chance.randint(min(max(self.longest.get(row, 0) - self.back, 0), length), length)]
        )

    def check(self, results: list[StepResult], lengths: dict[int, int]) -> None:
        """Compare one batch's results of this session; where one failed, all later ones must have."""
        for result in results:
            expected, rows_on_failure = self.awaited.pop(result.seq)
            if result.error is None:
                assert torch.equal(result.hidden, expected)
                continue
            assert expected.isnan().any()
            assert [later.seq for later in results if later.error] == [result.seq, *self.awaited]
            self.awaited.clear()
            self.rows = rows_on_failure
            for row, hidden in self.rows.items():
                # A step whose beginning windows have forgotten leaves nothing of its rows.
                assert lengths.get(row, 0) in (0, len(hidden))
                self.rows[row] = hidden[: lengths.get(row, 0)]
            return


def _random_step(chance: random.Random, name: str, seq: int, shadow: _Shadow, reference: _Reference) -> EngineStep:
    ops: list[Fork | Drop] = []
    if chance.random() < 0.3:
        source, target = chance.randrange(shadow.max_rows), chance.randrange(shadow.max_rows)
        length = shadow.a_cut(chance, source)
        ops.append(Fork(source, target, length))
        shadow.rows[target] = shadow.row(source)[:length]
        shadow.longest[target] = shadow.longest.get(source, 0) if length else 0
    if chance.random() < 0.1:
        ops.append(Drop(0))
        shadow.rows.pop(0, None)
        shadow.longest.pop(0, None)
    slices, inputs, outputs, on_failure = [], [], [], dict(shadow.rows)
    for row in chance.sample(range(shadow.max_rows), chance.randint(0, shadow.max_rows)):
        start = len(shadow.row(row)) if chance.random() < 0.7 else shadow.a_cut(chance, row)
        count = min(chance.randint(1, 6), shadow.max_length - start)
        if count:
            new = torch.tensor([[chance.randrange(99), chance.randrange(99)] for _ in range(count)], dtype=torch.float)
            if chance.random() < 0.02:
                new[-1] = torch.nan
            on_failure[row] = shadow.row(row)[:start]
            shadow.rows[row] = torch.cat([shadow.row(row)[:start], new])
            shadow.longest[row] = max(shadow.longest.get(row, 0) if start else 0, start + count)
            slices.append(RowSlice(row, start, count))
            inputs.append(new)
            outputs.append(reference(shadow.rows[row])[start:])
    empty = torch.zeros(0, 2)
    shadow.awaited[seq] = torch.cat([empty, *outputs]), on_failure
    return EngineStep(name, seq, tuple(ops), tuple(slices), torch.cat([empty, *inputs]))


_Reference = Callable[[torch.Tensor], torch.Tensor]
SPAN = Span(4, 7)
KEEPS = {
    "everything": {},
    "windows": {4: Keep(window=3), 6: Keep(window=3)},
    "windows and chunks": {4: Keep(chunk=5), 5: Keep(window=1)},
    "windows alone": {4: Keep(window=4), 5: Keep(window=4), 6: Keep(window=4)},
}


@pytest.mark.parametrize("keeps", KEEPS)
def test_accounting_is_exact_after_ten_thousand_opens_steps_forks_rollbacks_failures_and_closes(
    keeps: str, monkeypatch: pytest.MonkeyPatch
):
    # So that windows move on in short rows, which are quick to compute.
    monkeypatch.setattr(kv_layout, "RESENT_POSITIONS", 2)
    chance = random.Random(2)
    kept = KEEPS[keeps]
    engine = FakeEngine(SPAN, hidden_size=2, kv_tokens=60 * SIZE, page_tokens=SIZE, batch_tokens=9, keeps=kept)
    shadows: dict[str, _Shadow] = {}
    for event in range(2_500):
        match chance.choice(["open", "close", "step", "step", "step", "turn", "turn", "turn", "hold"]):
            case "open":
                name = f"s{event}"
                rows = chance.randint(1, 4)
                size = SessionSize(chance.randint(1, 40), rows, max_rollback=3, prompt_length=chance.choice([0, 1, 9]))
                wanted = engine.tokens_wanted(size)
                if wanted <= engine.free_tokens:
                    engine.open(name, size, owner=event % 3)
                    shadows[name] = _Shadow(size)
                    assert engine.tokens_of(name) == wanted
                else:
                    with pytest.raises(NoRoomError):
                        engine.open(name, size)
            case "close" if shadows and chance.random() < 0.3:
                name = chance.choice(list(shadows))
                # Some of them have steps in the queue: they are cancelled with it.
                engine.close(name)
                del shadows[name]
            case "step" if shadows:
                name = chance.choice(list(shadows))
                reference = partial(fake_forward, blocks=SPAN, keeps=kept)
                engine.submit(_random_step(chance, name, event, shadows[name], reference))
            case "hold" if shadows:
                engine.hold(chance.choice(list(shadows)), chance.random() < 0.3)
            case "turn" if engine.ready():
                batch = engine.plan()
                output = engine.run(batch)
                gone = chance.choice(list(shadows)) if chance.random() < 0.05 else None
                if gone is not None:
                    # Cancelled while it may be in the batch.
                    engine.close(gone)
                    del shadows[gone]
                results = engine.collect(batch, output)
                for name in {result.session for result in results}:
                    own = [result for result in results if result.session == name]
                    shadows[name].check(own, engine.lengths(name))
        expected = sum(engine.tokens_of(name) for name in shadows)
        assert engine.free_tokens == max(0, engine.total_tokens - expected)
    for name in shadows:
        engine.close(name)
    assert engine.free_tokens == engine.total_tokens
