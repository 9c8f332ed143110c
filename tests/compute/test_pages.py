"""Pages: exact accounting and rows that never see each other's writes, whatever happens in whatever order."""

from __future__ import annotations

import random

import pytest
import torch

from peerd.compute.engine_errors import NoRoomError
from peerd.compute.fake_engine import FakeEngine, fake_forward
from peerd.compute.pages import PagePool, PageTable
from peerd.compute.steps import EngineStep, StepResult
from peerd.protocol.rows import Drop, Fork, RowSlice
from peerd.protocol.span import Span

SIZE = 4


def test_a_row_alone_lies_side_by_side():
    pool = PagePool(10, SIZE)
    reserve = pool.reserve(2, 5)
    tables = [PageTable(reserve, row) for row in range(2)]
    for _ in range(20):
        for table in tables:
            table.grow(1)
    assert [table.snapshot() for table in tables] == [range(0, 5), range(5, 10)]


def test_a_fragmented_pool_still_grants_all_its_pages():
    pool = PagePool(6, SIZE)
    reserves = [pool.reserve(1, 1) for _ in range(6)]
    for reserve in reserves[::2]:
        reserve.close()
    with pytest.raises(NoRoomError) as refusal:
        pool.reserve(2, 2)
    assert refusal.value.free_tokens == 3 * SIZE
    table = PageTable(pool.reserve(1, 3), 0)
    table.grow(3 * SIZE)
    assert table.snapshot() == (0, 2, 4)
    assert pool.free_pages == 0


def test_forked_rows_share_pages_until_one_writes():
    reserve = PagePool(8, SIZE).reserve(2, 4)
    source, target = PageTable(reserve, 0), PageTable(reserve, 1)
    source.grow(10)
    target.become(source, 10)
    assert reserve.used_pages == 3
    (copy,) = target.grow(1)
    assert copy.source == source.snapshot()[2]
    assert target.snapshot()[:2] == tuple(source.snapshot()[:2])
    assert reserve.used_pages == 4
    # Nobody else has the page any more, so its owner writes in place.
    assert source.grow(1) == []


def test_ten_thousand_forks_cuts_and_writes_keep_rows_apart():
    chance = random.Random(1)
    rows, longest = 5, 30
    pool = PagePool(64, SIZE)
    reserve = pool.reserve(rows, pool.pages_for(longest))
    tables = [PageTable(reserve, row) for row in range(rows)]
    expected: list[list[int]] = [[] for _ in range(rows)]
    memory: dict[int, list[int]] = {page: [0] * SIZE for page in range(64)}
    for stamp in range(10_000):
        row, other = chance.randrange(rows), chance.randrange(rows)
        table = tables[row]
        match chance.choice(["grow", "grow", "cut", "fork"]):
            case "grow":
                count = chance.randint(0, longest - table.length)
                start = table.length
                for copy in table.grow(count):
                    memory[copy.target] = list(memory[copy.source])
                pages = table.snapshot()
                for position in range(start, table.length):
                    memory[pages[position // SIZE]][position % SIZE] = stamp
                expected[row] += [stamp] * count
            case "cut":
                length = chance.randint(0, table.length)
                table.cut(length)
                del expected[row][length:]
            case "fork":
                length = chance.randint(0, tables[other].length)
                table.become(tables[other], length)
                expected[row] = expected[other][:length]
        seen = [[value for page in table.snapshot() for value in memory[page]][: table.length] for table in tables]
        assert seen == expected
        assert reserve.used_pages == len({page for table in tables for page in table.snapshot()})
    reserve.close()
    assert pool.free_pages == 64


class _Shadow:
    """What a session should hold."""

    def __init__(self, max_rows: int, max_length: int) -> None:
        self.max_rows = max_rows
        self.max_length = max_length
        self.rows: dict[int, torch.Tensor] = {}
        # By step: its result, and the rows as they are where it fails.
        self.awaited: dict[int, tuple[torch.Tensor, dict[int, torch.Tensor]]] = {}

    def row(self, row: int) -> torch.Tensor:
        return self.rows.get(row, torch.zeros(0, 2))

    def check(self, results: list[StepResult]) -> None:
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
            return


def _random_step(chance: random.Random, name: str, seq: int, shadow: _Shadow, span: Span) -> EngineStep:
    ops: list[Fork | Drop] = []
    if chance.random() < 0.3:
        source, target = chance.randrange(shadow.max_rows), chance.randrange(shadow.max_rows)
        length = chance.randint(0, len(shadow.row(source)))
        ops.append(Fork(source, target, length))
        shadow.rows[target] = shadow.row(source)[:length]
    if chance.random() < 0.1:
        ops.append(Drop(0))
        shadow.rows.pop(0, None)
    slices, inputs, outputs, on_failure = [], [], [], dict(shadow.rows)
    for row in chance.sample(range(shadow.max_rows), chance.randint(0, shadow.max_rows)):
        start = len(shadow.row(row)) if chance.random() < 0.7 else chance.randint(0, len(shadow.row(row)))
        count = min(chance.randint(1, 6), shadow.max_length - start)
        if count:
            new = torch.tensor([[chance.randrange(99), chance.randrange(99)] for _ in range(count)], dtype=torch.float)
            if chance.random() < 0.02:
                new[-1] = torch.nan
            on_failure[row] = shadow.row(row)[:start]
            shadow.rows[row] = torch.cat([shadow.row(row)[:start], new])
            slices.append(RowSlice(row, start, count))
            inputs.append(new)
            outputs.append(fake_forward(shadow.rows[row], span)[start:])
    empty = torch.zeros(0, 2)
    shadow.awaited[seq] = torch.cat([empty, *outputs]), on_failure
    return EngineStep(name, seq, tuple(ops), tuple(slices), torch.cat([empty, *inputs]))


def test_accounting_is_exact_after_ten_thousand_opens_steps_forks_rollbacks_failures_and_closes():
    chance = random.Random(2)
    span = Span(4, 5)
    engine = FakeEngine(span, hidden_size=2, kv_tokens=60 * SIZE, page_tokens=SIZE, batch_tokens=9)
    shadows: dict[str, _Shadow] = {}
    for event in range(10_000):
        match chance.choice(["open", "close", "step", "step", "step", "turn", "turn", "turn"]):
            case "open":
                name, rows, length = f"s{event}", chance.randint(1, 4), chance.randint(1, 20)
                wanted = engine.tokens_wanted(max_length=length, max_rows=rows, max_rollback=length)
                if wanted <= engine.free_tokens:
                    engine.open(name, max_length=length, max_rows=rows, max_rollback=length)
                    shadows[name] = _Shadow(rows, length)
            case "close" if shadows and chance.random() < 0.3:
                name = chance.choice(list(shadows))
                engine.close(name)
                del shadows[name]
            case "step" if shadows:
                name = chance.choice(list(shadows))
                engine.submit(_random_step(chance, name, event, shadows[name], span))
            case "turn" if engine.ready():
                batch = engine.plan()
                results = engine.collect(batch, engine.run(batch))
                for name in {result.session for result in results}:
                    shadows[name].check([result for result in results if result.session == name])
        committed = sum(s.max_rows * -(-s.max_length // SIZE) * SIZE for s in shadows.values())
        assert engine.free_tokens == engine.total_tokens - committed
    for name in shadows:
        engine.close(name)
    assert engine.free_tokens == engine.total_tokens
