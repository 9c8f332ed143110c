"""Measures what the daemon's figures (`/metrics`) cost while it works: nanoseconds for a step and for a token.

    python -m benchmarks.costs.meters_bench

Prints the least of several times. A step is queued, run in a batch of 1 or 8 steps, and ended, and its hidden states
come and go once; a token is one of an answer.
"""

from __future__ import annotations

import timeit

import torch
import trio

from peerd.client.answer_meter import AnswerMeter
from peerd.compute.steps import Batch, EngineStep, Piece, StepResult
from peerd.meters import Meters
from peerd.protocol.rows import RowSlice
from peerd.protocol.span import Span
from peerd.server.step_meter import StepMeter

REPEATS, TIMES = 7, 20_000
BODY = memoryview(bytes(8192))


def step_ns(count: int) -> float:
    """What one step of a batch of `count` costs."""
    meter = StepMeter(Meters())
    steps = [EngineStep(object(), 7, (), (RowSlice(0, 0, 1),), torch.zeros(1, 1)) for _ in range(count)]
    batch = Batch(Span(0, 1), tuple(Piece(step, 0, 1, ()) for step in steps), ())
    results = [StepResult(step.session, step.seq, step.hidden) for step in steps]

    def run() -> None:
        for step in steps:
            meter.meters.received("exact", BODY)
            meter.queued(step.session, step.seq)
        meter.ran(batch, 1.0, 2.0)
        for result in results:
            meter.ended(result)
            meter.meters.sent("exact", [BODY])

    return min(timeit.repeat(run, number=TIMES, repeat=REPEATS)) / TIMES / count * 1e9


def token_ns() -> float:
    """What one token of an answer costs."""
    meter = AnswerMeter(Meters(), None)
    with meter.running():
        return min(timeit.repeat(lambda: meter.token(0), number=TIMES, repeat=REPEATS)) / TIMES * 1e9


async def main() -> None:
    print(f"a step: {step_ns(1):.0f} ns alone, {step_ns(8):.0f} ns in a batch of 8; a token: {token_ns():.0f} ns")


if __name__ == "__main__":
    trio.run(main)
