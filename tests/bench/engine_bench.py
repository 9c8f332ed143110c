"""How fast one engine decodes for 1, 8 and 16 sessions beside plain Transformers, in one run on one thread.

`python tests/bench/engine_bench.py [--context 64]`. Prints milliseconds a turn and tokens a second, each
also as a multiple of what Transformers' own decoder does with a `DynamicCache`, one sequence at a time.
The two alternate and the fastest of their turns count: on a shared machine the rest is noise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache

from peerd.compute.attention import register_attention
from peerd.compute.checkpoint import Checkpoint, open_checkpoint
from peerd.compute.demo_model import demo_model_path
from peerd.compute.engine import Engine
from peerd.compute.span_model import SpanModel, load_span
from peerd.compute.steps import EngineStep
from peerd.protocol.rows import RowSlice
from peerd.protocol.span import Span

SESSIONS = (1, 8, 16)
ROUNDS = 3
TURNS = 8


def local_turn_s(model: SpanModel, inputs: torch.Tensor, context: int) -> float:
    """Seconds that Transformers takes for one more position after `context`."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(inputs[None, :context], torch.arange(context)[None], cache)
        return _fastest(lambda turn: model(inputs[None, context + turn, None], torch.tensor([[context + turn]]), cache))


def engine_turn_s(engine: Engine, inputs: torch.Tensor, context: int, sessions: int) -> float:
    """Seconds that the engine takes for one more position of each session."""
    for session in range(sessions):
        engine.open(session, max_length=len(inputs), max_rows=1, max_rollback=0)
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
    engine.open("prompt", max_length=context, max_rows=1, max_rollback=0)
    began = time.perf_counter()
    _submit(engine, "prompt", 0, inputs[:context])
    _run_all(engine)
    seconds = time.perf_counter() - began
    engine.close("prompt")
    return seconds


def local_prefill_s(model: SpanModel, inputs: torch.Tensor, context: int) -> float:
    """The same by Transformers."""
    began = time.perf_counter()
    with torch.inference_mode():
        model(inputs[None, :context], torch.arange(context)[None], DynamicCache(config=model.config))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=64, help="positions cached before decoding begins")
    context = parser.parse_args().context
    torch.set_num_threads(1)
    with open_checkpoint(demo_model_path()) as checkpoint:
        span = Span(0, checkpoint.block_count)
        plain = load_span(checkpoint, span, dtype=torch.float32, attention="sdpa")
        engine = _engine(checkpoint, span, (context + TURNS + 16) * max(SESSIONS))
    inputs = torch.randn(context + TURNS, plain.hidden_size)
    local_s = min(local_turn_s(plain, inputs, context) for _ in range(ROUNDS))
    turns_s = {
        sessions: min(engine_turn_s(engine, inputs, context, sessions) for _ in range(ROUNDS)) for sessions in SESSIONS
    }
    local_s = min(local_s, *(local_turn_s(plain, inputs, context) for _ in range(ROUNDS)))
    print(f"one thread, fp32, {len(span)} blocks of {plain.hidden_size}, {context} positions cached")
    print(f"Transformers, 1 sequence: {local_s * 1000:6.1f} ms a turn, {1 / local_s:6.1f} tokens/s")
    for sessions, turn_s in turns_s.items():
        rate = sessions / turn_s
        print(
            f"engine, {sessions:2} sessions:      {turn_s * 1000:6.1f} ms a turn, {rate:6.1f} tokens/s: "
            f"{rate * local_s:.2f} x Transformers"
        )
    local_first_s = min(local_prefill_s(plain, inputs, context) for _ in range(ROUNDS))
    first_s = min(prefill_s(engine, inputs, context) for _ in range(ROUNDS))
    print(f"prefill of {context}: Transformers {local_first_s * 1000:.0f} ms, engine {first_s * 1000:.0f} ms")


def _engine(checkpoint: Checkpoint, span: Span, kv_tokens: int) -> Engine:
    model = load_span(checkpoint, span, dtype=torch.float32, attention=register_attention())
    return Engine(model, kv_tokens=kv_tokens)


def _submit(engine: Engine, session: int | str, start: int, hidden: torch.Tensor) -> None:
    engine.submit(EngineStep(session, 1, (), (RowSlice(0, start, len(hidden)),), hidden))


def _run_all(engine: Engine) -> None:
    while batch := engine.plan():
        engine.collect(batch, engine.run(batch))


def _fastest(turn: Callable[[int], object]) -> float:
    fastest = float("inf")
    for number in range(TURNS):
        began = time.perf_counter()
        turn(number)
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


if __name__ == "__main__":
    main()
