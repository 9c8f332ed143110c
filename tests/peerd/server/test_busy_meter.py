from __future__ import annotations

from random import Random

import pytest
import trio

from peerd.server.busy_meter import MEMORY_S, BusyMeter


def run_batches(meter: BusyMeter, length_s: float, pause_s: float, until_s: float) -> float:
    """Batches of one length with pauses between; returns when the last has ended."""
    now = 0.0
    while now < until_s:
        meter.ran(now, now + length_s)
        now += length_s + pause_s
    return now - pause_s


def test_an_idle_device_makes_nobody_wait() -> None:
    assert BusyMeter().queue_s(0.1, 5.0) == 0.0


def test_a_busy_device_costs_half_a_batch_and_what_others_add_to_the_next() -> None:
    meter = BusyMeter()
    now = run_batches(meter, 0.2, 0.0, 10 * MEMORY_S)
    assert meter.queue_s(0.2, now) == pytest.approx(0.1, rel=0.05)
    assert meter.queue_s(0.05, now) == pytest.approx(0.1 + 0.15, rel=0.05)


def test_a_device_that_rests_for_half_of_the_time_costs_half_of_that() -> None:
    meter = BusyMeter()
    now = run_batches(meter, 0.2, 0.2, 10 * MEMORY_S)
    assert meter.queue_s(0.05, now) == pytest.approx((0.1 + 0.15) / 2, rel=0.05)


def test_it_tells_what_steps_that_come_at_random_really_wait() -> None:
    random = Random(1)
    meter = BusyMeter(memory_s=1e5)
    batches, now = [], 0.0
    while now < 1e4:
        began = now + random.expovariate(1 / 0.3)
        now = began + random.expovariate(1 / 0.2)
        batches.append((began, now))
        meter.ran(began, now)
    waits = []
    batch = iter(batches)
    began, ended = next(batch)
    for at in sorted(random.uniform(0, batches[-1][0]) for _ in range(20_000)):
        while ended < at:
            began, ended = next(batch)
        waits.append(max(0.0, ended - max(at, began)) if at > began else 0.0)
    # There is no other load: the device takes as long for one step as for many.
    weight = 1e5 / now
    assert meter.queue_s(1e9, now) * weight == pytest.approx(sum(waits) / len(waits), rel=0.1)


def test_a_load_that_has_ended_is_forgotten() -> None:
    meter = BusyMeter()
    now = run_batches(meter, 0.2, 0.0, 10 * MEMORY_S)
    assert meter.queue_s(0.05, now + 5 * MEMORY_S) < 0.01


async def test_a_server_tells_how_busy_it_is(open_swarm) -> None:
    import torch

    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4, step_s=0.2)
        client = await swarm.client()
        assert host.task.busy.queue_s(0.2, trio.current_time()) == 0.0
        session = await client.session(host.span)
        for _ in range(50):
            await session.step(torch.ones(1, 8))
        assert 0.04 < host.task.busy.queue_s(0.2, trio.current_time()) < 0.1
        session.close()
