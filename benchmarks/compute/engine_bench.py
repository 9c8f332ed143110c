"""Measures how one engine decodes on one thread: 1 to 32 sessions, sessions beside a long prefill, and forks.

    python -m benchmarks.compute.engine_bench [--context 64] [--part sessions|latencies|beams]

It prints milliseconds a turn and tokens a second, as multiples of one session and of Transformers' own decoder with a
`DynamicCache`, one sequence at a time. All variants alternate, and the fastest turns count, except for latencies, where
the spread matters. Time is this thread's CPU time, because wall-clock time on a shared machine also measures other
programs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache

from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.engine import Engine
from peerd.compute.model.span_model import SpanModel, load_span
from peerd.compute.steps import EngineStep
from peerd.protocol.rows import Fork, RowSlice, SessionSize
from peerd.protocol.span import Span

SESSIONS = (1, 2, 4, 8, 16, 32)
ROUNDS = 3
TURNS = 8
PREFILL = 2048
LONG_CONTEXT = 512
BEAMS = 4
LATENCIES = 100
clock = time.thread_time


def local_turn_s(model: SpanModel, inputs: torch.Tensor, context: int) -> float:
    """Seconds that Transformers takes for one more position after `context`."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(inputs[None, :context], torch.arange(context)[None], cache)
        return _fastest(lambda turn: model(inputs[None, context + turn, None], torch.tensor([[context + turn]]), cache))


def engine_turn_s(engine: Engine, inputs: torch.Tensor, context: int, sessions: int) -> float:
    """Seconds that the engine takes for one more position of each session."""
    for session in range(sessions):
        engine.open(session, SessionSize(len(inputs)))
        _submit(engine, session, 0, inputs[:context])
    _run_all(engine)

    def turn(number: int) -> None:
        start = context + number
        for session in range(sessions):
            _submit(engine, session, start, inputs[start : start + 1])
        _run_all(engine)

    seconds = _fastest(turn)
    for session in range(sessions):
        engine.close(session)
    return seconds


def prefill_s(engine: Engine, inputs: torch.Tensor, context: int) -> float:
    """Seconds that the engine takes for a prompt of `context` positions."""
    engine.open("prompt", SessionSize(context))
    began = clock()
    _submit(engine, "prompt", 0, inputs[:context])
    _run_all(engine)
    seconds = clock() - began
    engine.close("prompt")
    return seconds


def local_prefill_s(model: SpanModel, inputs: torch.Tensor, context: int) -> float:
    """Seconds that Transformers takes for a prompt of `context` positions."""
    began = clock()
    with torch.inference_mode():
        model(inputs[None, :context], torch.arange(context)[None], DynamicCache(config=model.config))
    return clock() - began


def latencies_s(engine: Engine, inputs: torch.Tensor, context: int, *, beside: bool) -> list[float]:
    """Seconds that each of a session's steps takes, alone or as long as a prompt of 2,048 positions is computed."""
    engine.open("decode", SessionSize(context + 2 * LATENCIES))
    _submit(engine, "decode", 0, inputs[:context])
    _run_all(engine)
    if beside:
        engine.open("prompt", SessionSize(PREFILL))
        _submit(engine, "prompt", 0, inputs.repeat(-(-PREFILL // len(inputs)), 1)[:PREFILL])
    seconds = []
    for number in range(LATENCIES):
        if beside and not engine.ready():
            break
        began = clock()
        _submit(engine, "decode", context + number, inputs[:1])
        while not _turn(engine, "decode"):
            pass
        seconds.append(clock() - began)
    _run_all(engine)
    engine.close("decode")
    if beside:
        engine.close("prompt")
    return seconds


def rows_turn_s(engine: Engine, inputs: torch.Tensor, context: int, *, forks: bool) -> float:
    """Seconds for one more position of four rows; with `forks` each row first becomes another, as in beam search."""
    engine.open("beam", SessionSize(context + 2 * TURNS, max_rows=BEAMS))
    for row in range(BEAMS):
        engine.submit(EngineStep("beam", 1, (), (RowSlice(row, 0, context),), inputs[:context]))
    _run_all(engine)

    def turn(number: int) -> None:
        start = context + number
        ops = tuple(Fork(row - 1, row, start) for row in range(BEAMS - 1, 0, -1)) if forks else ()
        rows = tuple(RowSlice(row, start, 1) for row in range(BEAMS))
        engine.submit(EngineStep("beam", 1, ops, rows, inputs[:BEAMS]))
        _run_all(engine)

    seconds = _fastest(turn)
    engine.close("beam")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=64, help="positions cached before decoding begins")
    parser.add_argument("--part", choices=("sessions", "latencies", "beams"), help="only this part (default: all)")
    args = parser.parse_args()
    context: int = args.context
    torch.set_num_threads(1)
    with open_checkpoint(demo_model_path()) as checkpoint:
        span = Span(0, checkpoint.block_count)
        most = max((context + TURNS + 16) * max(SESSIONS), BEAMS * (LONG_CONTEXT + 2 * TURNS), PREFILL)
        engine = _engine(checkpoint, span, most + context + 2 * LATENCIES + 64)
        print(f"one thread, fp32, {len(span)} blocks of {engine.hidden_size}, {context} positions cached")
        if args.part in (None, "sessions"):
            _print_sessions(engine, load_span(checkpoint, span, dtype=torch.float32, attention="sdpa"), context)
    if args.part in (None, "latencies"):
        _print_latencies(engine, torch.randn(context + 1, engine.hidden_size), context)
    if args.part in (None, "beams"):
        _print_beams(engine, torch.randn(LONG_CONTEXT, engine.hidden_size))


def _print_sessions(engine: Engine, plain: SpanModel, context: int) -> None:
    inputs = torch.randn(context + TURNS, plain.hidden_size)
    local_s = min(local_turn_s(plain, inputs, context) for _ in range(ROUNDS))
    turns_s = {
        sessions: min(engine_turn_s(engine, inputs, context, sessions) for _ in range(ROUNDS)) for sessions in SESSIONS
    }
    local_s = min(local_s, *(local_turn_s(plain, inputs, context) for _ in range(ROUNDS)))
    print(f"Transformers, 1 sequence: {local_s * 1000:6.1f} ms a turn, {1 / local_s:6.1f} tokens/s")
    for sessions, turn_s in turns_s.items():
        rate = sessions / turn_s
        print(
            f"engine, {sessions:2} sessions:      {turn_s * 1000:6.1f} ms a turn, {rate:6.1f} tokens/s: "
            f"{rate * turns_s[1]:.2f} x one, {rate * local_s:.2f} x Transformers"
        )
    local_first_s = min(local_prefill_s(plain, inputs, context) for _ in range(ROUNDS))
    first_s = min(prefill_s(engine, inputs, context) for _ in range(ROUNDS))
    print(f"prefill of {context}: Transformers {local_first_s * 1000:.0f} ms, engine {first_s * 1000:.0f} ms")


def _print_latencies(engine: Engine, inputs: torch.Tensor, context: int) -> None:
    alone, beside = (latencies_s(engine, inputs, context, beside=beside) for beside in (False, True))
    for name, seconds in (("alone", alone), (f"beside a prefill of {PREFILL}", beside)):
        seconds.sort()
        p50, p99 = (seconds[min(int(len(seconds) * share), len(seconds) - 1)] * 1000 for share in (0.5, 0.99))
        print(f"a decode {name}: p50 {p50:.0f} ms, p99 {p99:.0f} ms of {len(seconds)}")
    whole_s = prefill_s(engine, inputs.repeat(-(-PREFILL // len(inputs)), 1), PREFILL)
    print(f"that prefill alone: {whole_s * 1000:.0f} ms, for which a decode would wait without chunks")


def _print_beams(engine: Engine, inputs: torch.Tensor) -> None:
    turns_s = {
        forks: min(rows_turn_s(engine, inputs, LONG_CONTEXT, forks=forks) for _ in range(ROUNDS))
        for forks in (False, True)
    }
    print(
        f"{BEAMS} rows of {LONG_CONTEXT}: {turns_s[False] * 1000:.1f} ms a turn, {turns_s[True] * 1000:.1f} ms where"
        f" three of them fork each turn: {turns_s[True] / turns_s[False]:.2f} x"
    )


def _engine(checkpoint: Checkpoint, span: Span, kv_tokens: int) -> Engine:
    model = load_span(checkpoint, span, dtype=torch.float32, attention=register_attention())
    return Engine(model, kv_tokens=kv_tokens)


def _submit(engine: Engine, session: int | str, start: int, hidden: torch.Tensor) -> None:
    engine.submit(EngineStep(session, 1, (), (RowSlice(0, start, len(hidden)),), hidden))


def _run_all(engine: Engine) -> None:
    while batch := engine.plan():
        engine.collect(batch, engine.run(batch))


def _turn(engine: Engine, session: str) -> bool:
    """Run one batch. Returns whether it contained the session's result."""
    batch = engine.plan()
    assert batch is not None
    return any(result.session == session for result in engine.collect(batch, engine.run(batch)))


def _fastest(turn: Callable[[int], object]) -> float:
    fastest = float("inf")
    for number in range(TURNS):
        began = clock()
        turn(number)
        fastest = min(fastest, clock() - began)
    return fastest


if __name__ == "__main__":
    main()
