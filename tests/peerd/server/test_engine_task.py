"""The device's task: it takes batches, gives results to their sessions, and translates the engine's errors."""

import itertools
import threading
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch
import trio
import trio.lowlevel
import trio.testing

from peerd.compute.errors import StepGapError
from peerd.compute.kv.layout import Keep
from peerd.compute.steps import BatchOutput
from peerd.net.limits.owners import Owner
from peerd.protocol.errors import BadResult, ContextTooLong, InternalError, InvalidRequest, NoRoom, Overloaded
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.session import NextHop, OpenSession, Step
from peerd.protocol.rows import RowSlice, SessionSize
from peerd.protocol.span import Span
from peerd.server.device_queue import MAX_JOBS_AN_OWNER
from peerd.server.engine_task import EngineTask
from peerd.testing.fake_engine import FakeEngine, fake_forward

WIDTH = 8
SPAN = Span(2, 5)
STEP_S = 1.0


def owner(name):
    return Owner(PeerId(str(name)))


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 251, (count, WIDTH), generator=generator).float()


def opening(**fields):
    asked = {"session": bytes(16), "hop": 0, "epoch": 0, "model": bytes(32), "start": 2, "end": 5, "max_length": 64}
    return OpenSession(**asked | fields)


def step(start, count, seq=1, row=0):
    return Step(epoch=0, seq=seq, rows=(RowSlice(row, start, count),))


@asynccontextmanager
async def running(engine=None, run_batch=None, is_strict=None):
    async def slow(run, batch):
        await trio.sleep(STEP_S)
        return run(batch)

    engine = engine or FakeEngine(SPAN, hidden_size=WIDTH, kv_tokens=256)
    task = EngineTask(engine, run_batch=run_batch or slow, is_strict=is_strict)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(task.run)
        yield task
        nursery.cancel_scope.cancel()


async def test_results_come_back_in_order_to_their_own_session():
    async with running() as task:
        results = {"a": [], "b": []}
        for name, took in results.items():
            await task.open(name, owner(name), opening(), took.append)
        rows = {"a": tokens(5, 1), "b": tokens(5, 2)}
        for name, row in rows.items():
            task.submit(name, step(0, 3), row[:3])
            task.submit(name, step(3, 2, 2), row[3:])
        await trio.sleep(5 * STEP_S)
        for name, row in rows.items():
            assert torch.equal(torch.cat(results[name]), fake_forward(row, SPAN))


async def test_a_device_of_which_we_may_use_a_share_rests_after_each_batch():
    async with running() as task:
        task.share = 0.25
        took = []
        await task.open("a", owner("a"), opening(), took.append)
        began = trio.current_time()
        for seq in range(3):
            task.submit("a", step(seq, 1, seq + 1), tokens(1))
            while len(took) <= seq:
                await trio.sleep(0.1)
        # Two rests of three steps' time lie between three batches.
        assert trio.current_time() - began == pytest.approx(9 * STEP_S, abs=0.5)


async def test_the_engines_errors_travel_as_the_wires():
    async with running() as task:
        with pytest.raises(ContextTooLong):
            await task.open("x", owner("x"), opening(max_length=257), print)
        await task.open("a", owner("a"), opening(max_length=200), print)
        with pytest.raises(NoRoom) as caught:
            await task.open("b", owner("b"), opening(timeout_ms=1000), print)
        assert caught.value.free_tokens == 48
        with pytest.raises(InvalidRequest):
            task.submit("a", step(0, 2), tokens(3))
        with pytest.raises(InvalidRequest):
            task.submit("a", step(0, 2, row=1), tokens(2))
        with pytest.raises(ContextTooLong):
            task.submit("a", step(0, 201), tokens(201))
        task.submit("a", step(0, 4), tokens(4))
        with pytest.raises(StepGapError) as gap:
            task.submit("a", step(7, 1, 2), tokens(1))
        assert gap.value.have == {0: 4}


async def test_a_result_that_is_not_finite_is_a_bad_result():
    class Broken(FakeEngine):
        def run(self, batch):
            output = super().run(batch)
            return BatchOutput(output.hidden, (False,) * len(output.finite))

    async with running(Broken(SPAN, hidden_size=WIDTH)) as task:
        results = []
        await task.open("a", owner("a"), opening(), results.append)
        task.submit("a", step(0, 4), tokens(4))
        await trio.sleep(2 * STEP_S)
        assert [type(result) for result in results] == [BadResult]


async def test_a_held_session_is_left_out_until_it_is_let_go():
    async with running() as task:
        held, free = [], []
        await task.open("held", owner(1), opening(), held.append)
        await task.open("free", owner(2), opening(), free.append)
        task.hold("held", True)
        task.submit("held", step(0, 1), tokens(1))
        task.submit("free", step(0, 1), tokens(1))
        await trio.sleep(10 * STEP_S)
        assert (len(held), len(free)) == (0, 1)
        task.hold("held", False)
        await trio.sleep(1.5 * STEP_S)
        assert len(held) == 1


async def test_a_session_that_closes_in_mid_batch_frees_its_pages_after_it_and_lets_the_next_in():
    async with running() as task:
        results = []
        await task.open("a", owner("a"), opening(max_length=256), results.append)
        task.submit("a", step(0, 200), tokens(200))
        await trio.sleep(0.5 * STEP_S)
        task.close("a")
        # The device may still write to its pages.
        assert task.engine.free_tokens == 0
        before = trio.current_time()
        await task.open("b", owner("b"), opening(max_length=256, timeout_ms=60_000), results.append)
        assert trio.current_time() - before == pytest.approx(0.5 * STEP_S)
        assert results == []
        task.close("b")
        assert task.engine.free_tokens == 256


async def test_a_session_counts_with_what_it_needs_and_others_get_what_it_leaves():
    async with running() as task:
        results = []
        await task.open("a", owner("a"), opening(max_length=256), results.append)
        assert task.tokens_of("a") == 256
        with pytest.raises(NoRoom):
            await task.open("b", owner("b"), opening(max_length=64, timeout_ms=1000), results.append)
        task.submit("a", step(0, 40), tokens(40))
        await task.open("b", owner("b"), opening(max_length=64, timeout_ms=5000), results.append)
        assert (task.tokens_of("a"), task.tokens_of("b"), task.engine.free_tokens) == (96, 64, 96)
        task.close("a")
        # All that was counted for it is taken off again: somebody else may have half of the pool, and no more.
        await task.open("c", owner("a"), opening(max_length=128), results.append)
        assert task.engine.free_tokens == 64


@pytest.mark.real_time
async def test_batches_run_in_another_thread_one_at_a_time():
    here, there = threading.get_ident(), set()

    class Watched(FakeEngine):
        def run(self, batch):
            there.add(threading.get_ident())
            return super().run(batch)

    task = EngineTask(Watched(SPAN, hidden_size=WIDTH))
    done = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(task.run)
        await task.open("a", owner("a"), opening(), lambda _: done.set())
        task.submit("a", step(0, 4), tokens(4))
        await done.wait()
        nursery.cancel_scope.cancel()
    assert there
    assert here not in there


async def test_work_for_the_device_waits_for_the_batch_before_it_and_goes_before_the_next():
    order = []

    async def slow(run, batch):
        order.append("begins")
        await trio.sleep(STEP_S)
        order.append("ends")
        return run(batch)

    async with running(run_batch=slow) as task:
        await task.open("a", owner("a"), opening(), lambda _: None)
        task.submit("a", step(0, 3), tokens(3))
        await trio.sleep(STEP_S / 2)
        task.submit("a", step(3, 1, 2), tokens(1))
        assert await task.run_blocking(lambda: order.append("work") or 7) == 7
        await trio.sleep(2 * STEP_S)
    assert order == ["begins", "ends", "work", "begins", "ends"]


async def test_work_that_fails_says_so_to_its_caller_and_the_device_goes_on():
    def fail():
        raise ValueError("no")

    async with running() as task:
        with pytest.raises(ValueError, match="no"):
            await task.run_blocking(fail)
        took = []
        await task.open("a", owner("a"), opening(), took.append)
        task.submit("a", step(0, 3), tokens(3))
        await trio.sleep(2 * STEP_S)
        assert torch.equal(took[0], fake_forward(tokens(3), SPAN))


class Turns:
    """A work of so many turns, each longer than a slice is; notes when each began."""

    def __init__(self, count, log=None, name="work"):
        self.left = count
        self.log = log if log is not None else []
        self.name = name

    def turn(self):
        self.log.append((self.name, trio.current_time()))
        self.left -= 1
        return self.left == 0


def one_turn_a_slice(monkeypatch):
    monkeypatch.setattr("peerd.server.device_queue.SLICE_S", 0.0)


async def test_training_runs_at_once_where_nobody_decodes(monkeypatch):
    one_turn_a_slice(monkeypatch)
    async with running() as task:
        work = Turns(5)
        await task.run_work("trainer", work)
        assert [when for _, when in work.log] == [STEP_S * turn for turn in range(1, 6)]


async def test_a_decode_waits_for_one_turn_of_training_and_not_for_all_of_it(monkeypatch):
    one_turn_a_slice(monkeypatch)
    async with running() as task:
        answered = []
        await task.open("a", owner("a"), opening(), lambda _: answered.append(trio.current_time()))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task.run_work, "trainer", Turns(100))
            await trio.sleep(10.5 * STEP_S)
            task.submit("a", step(0, 1), tokens(1))
            await trio.sleep(3 * STEP_S)
            nursery.cancel_scope.cancel()
        assert answered == [12 * STEP_S]


async def test_training_gets_an_eighth_of_a_device_that_never_stops_decoding(monkeypatch):
    one_turn_a_slice(monkeypatch)
    async with running() as task:
        positions = itertools.count()

        def decode(_=None):
            position = next(positions)
            task.submit("a", step(position, 1, position + 1), tokens(1))

        await task.open("a", owner("a"), opening(max_length=256), decode)
        decode()
        work = Turns(1000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task.run_work, "trainer", work)
            await trio.sleep(80.5 * STEP_S)
            nursery.cancel_scope.cancel()
        assert len(work.log) == 10


async def test_owners_take_turns_and_each_ones_works_keep_their_order(monkeypatch):
    one_turn_a_slice(monkeypatch)
    async with running() as task, trio.open_nursery() as nursery:
        log = []
        for owner, name in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1")):
            nursery.start_soon(task.run_work, owner, Turns(2, log, name))
            await trio.lowlevel.checkpoint()
        await trio.sleep(9 * STEP_S)
        assert [name for name, _ in log] == ["a1", "a1", "a2", "a2", "b1", "b1", "a3", "a3"]


async def test_a_work_whose_caller_left_gets_no_further_turn_and_lets_the_next_in(monkeypatch):
    one_turn_a_slice(monkeypatch)
    async with running() as task:
        gone, queued = Turns(100), Turns(100)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task.run_work, "a", gone)
            nursery.start_soon(task.run_work, "a", queued)
            await trio.sleep(2.5 * STEP_S)
            nursery.cancel_scope.cancel()
        next_one = Turns(1)
        await task.run_work("b", next_one)
        assert (100 - gone.left) + (100 - queued.left) == 3
        assert next_one.log == [("work", 4 * STEP_S)]


async def test_a_work_that_fails_tells_its_caller_and_nobody_else():
    class Broken(Turns):
        def turn(self):
            raise ValueError("broken")

    async with running() as task:
        with pytest.raises(ValueError, match="broken"):
            await task.run_work("a", Broken(1))
        await task.run_work("a", Turns(1))


async def test_too_many_works_of_one_owner_are_refused_and_other_owners_are_not():
    async with running() as task, trio.open_nursery() as nursery:
        # One of them runs, the others wait.
        for _ in range(MAX_JOBS_AN_OWNER + 1):
            nursery.start_soon(task.run_work, "a", Turns(3))
            await trio.sleep(0.01 * STEP_S)
        with pytest.raises(Overloaded):
            await task.run_work("a", Turns(3))
        await task.run_work("b", Turns(1))
        nursery.cancel_scope.cancel()


async def test_memory_for_outputs_that_a_hop_keeps_is_committed_with_the_session():
    # Windows let a session be much longer than its KV tokens.
    engine = FakeEngine(SPAN, hidden_size=WIDTH, kv_tokens=1024, keeps=dict.fromkeys((2, 3, 4), Keep(window=4)))
    async with running(engine) as task:
        long = opening(max_length=1500, next=NextHop(b"", b""), timeout_ms=0)
        assert engine.tokens_wanted(SessionSize(1500)) < 512
        await task.open("a", owner("a"), long, print)
        with pytest.raises(NoRoom, match="outputs to keep"):
            await task.open("b", owner("b"), long, print)
        with pytest.raises(ContextTooLong, match="outputs to keep"):
            await task.open("c", owner("c"), replace(long, max_rows=2), print)
        # The last hop keeps nothing, and what is closed is free.
        await task.open("d", owner("d"), replace(long, next=None), print)
        task.close("a")
        await task.open("b", owner("b"), long, print)
        # A caller that is cancelled in the moment of the grant leaves nothing behind.
        task.close("d")
        free = engine.free_tokens
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task.open, "e", owner("e"), replace(long, timeout_ms=1000), print)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            task.close("b")
        assert engine.free_tokens > free
        await task.open("f", owner("f"), long, print)


class Failing(FakeEngine):
    """Fails on every batch with one of the `culprits`, and altogether where it is `broken`."""

    def __init__(self, *culprits, error=IndexError):
        super().__init__(SPAN, hidden_size=WIDTH, kv_tokens=1024)
        self.culprits = set(culprits)
        self.error = error
        self.broken = False

    def run(self, batch):
        if self.broken or self.culprits & {piece.step.session for piece in batch.pieces}:
            raise self.error("no")
        return super().run(batch)

    def forward(self, hidden, blocks=None):
        if self.broken:
            raise self.error("no")
        return super().forward(hidden, blocks)


async def test_a_batch_that_fails_costs_the_session_that_makes_it_fail_and_no_other():
    async with running(Failing("bad"), is_strict=False) as task:
        results = {"bad": [], "good": []}
        for name, took in results.items():
            await task.open(name, owner(name), opening(), took.append)
            task.submit(name, step(0, 3), tokens(3))
        await trio.sleep(10 * STEP_S)
        assert [type(result) for result in results["bad"]] == [InternalError]
        assert torch.equal(results["good"][0], fake_forward(tokens(3), SPAN))
        assert task.health.failed_batches == 1


async def test_a_bug_is_raised_under_strict():
    with pytest.RaisesGroup(IndexError, flatten_subgroups=True):
        async with running(Failing("bad"), is_strict=True) as task:
            await task.open("bad", owner("bad"), opening(), print)
            task.submit("bad", step(0, 3), tokens(3))
            await trio.sleep(10 * STEP_S)


async def test_a_device_without_memory_is_no_bug():
    async with running(Failing("large", error=torch.OutOfMemoryError), is_strict=True) as task:
        took = []
        await task.open("large", owner("large"), opening(), took.append)
        task.submit("large", step(0, 3), tokens(3))
        await trio.sleep(3 * STEP_S)
        assert [type(result) for result in took] == [InternalError]


async def fail_alone(task, name, share="same"):
    took = []
    await task.open(name, Owner(PeerId(name), share), opening(), took.append)
    task.submit(name, step(0, 1), tokens(1))
    await trio.sleep(2 * STEP_S)
    task.close(name)
    return took


async def test_one_network_that_makes_its_own_batches_fail_does_not_take_the_span_from_others():
    async with running(Failing(*"abcdef"), is_strict=False) as task:
        for name in "abcdef":
            await fail_alone(task, name)
        assert not task.health.broken
        took = await fail_alone(task, "good")
        assert torch.equal(took[0], fake_forward(tokens(1), SPAN))


@pytest.mark.parametrize("shares", [["1", "2", "3"], ["1", "1", "1"]], ids=["three networks", "a test fails too"])
async def test_a_device_that_fails_three_times_in_a_row_is_given_up(shares):
    engine = Failing()
    broken = []
    async with running(engine, is_strict=False) as task:
        task.on_broken.append(lambda: broken.append(trio.current_time()))
        await fail_alone(task, "before")
        engine.broken = len(set(shares)) == 1
        engine.culprits = {"a", "b", "c"}
        for name, share in zip("abc", shares, strict=True):
            assert not broken
            await fail_alone(task, name, share)
        assert len(broken) == 1
        assert "in a row" in task.health.broken


async def test_a_success_between_failures_begins_the_count_anew():
    async with running(Failing(*"abcd"), is_strict=False) as task:
        for name in ["a", "b", "good", "c", "d"]:
            await fail_alone(task, name, name)
        assert not task.health.broken


async def test_a_lost_device_is_given_up_at_once():
    async with running(Failing("bad", error=torch.AcceleratorError), is_strict=False) as task:
        await fail_alone(task, "bad")
        assert "computes nothing more" in task.health.broken


async def test_a_pass_without_memory_is_told_to_come_again():
    class Full(Turns):
        def turn(self):
            raise torch.OutOfMemoryError("CUDA out of memory")

    async with running() as task:
        with pytest.raises(NoRoom, match="no memory"):
            await task.run_work("a", Full(1))
        await task.run_work("a", Turns(1))


async def test_a_bug_in_a_pass_is_told_as_ours():
    class Broken(Turns):
        def turn(self):
            raise ZeroDivisionError

    async with running(is_strict=False) as task:
        with pytest.raises(InternalError):
            await task.run_work("a", Broken(1))
        await task.run_work("a", Turns(1))


async def test_a_session_whose_result_cannot_be_handed_over_costs_the_others_nothing():
    def fail(_result):
        raise ZeroDivisionError

    async with running(is_strict=False) as task:
        took = []
        await task.open("bad", owner("bad"), opening(), fail)
        await task.open("good", owner("good"), opening(), took.append)
        for name in ("bad", "good"):
            task.submit(name, step(0, 1), tokens(1))
        await trio.sleep(3 * STEP_S)
        assert torch.equal(took[0], fake_forward(tokens(1), SPAN))
