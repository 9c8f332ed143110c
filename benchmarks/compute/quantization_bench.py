"""`make bench-quantization`: compares int8 and nf4 with plain weights on SmolLM2-135M, in one run.

It measures the bytes of a block, the memory of a span, the engine's speed, and the perplexity over `fixed_text.txt`;
and the perplexity of each wire codec along a chain of two hops. There is one compute thread. Its CPU time counts, and
of several turns the fastest, because other programs on a shared machine make the rest noise. The model's weights were
published in 4 bits (Q4_1) and are computed in fp32, so nf4 rounds weights that were rounded before.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.quality import agreement, divergence, log_probabilities, perplexity, text_tokens
from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.device.free_memory import trim_heap
from peerd.compute.engine.capacity import block_bytes
from peerd.compute.engine.engine import BaseEngine, Engine
from peerd.compute.model.head import load_head
from peerd.compute.model.span_model import load_span
from peerd.compute.quantized.formats import QUANTIZATIONS
from peerd.compute.steps import EngineStep
from peerd.protocol.rows import RowSlice, SessionSize
from peerd.protocol.span import Span

PREFILL_TOKENS = 512
CONTEXT_TOKENS = 64
SESSIONS = (1, 8)
TURNS = 8
# The codec and the dtype that travel.
WIRES = (("exact", torch.float32), ("exact", torch.bfloat16), ("int8", torch.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-of", choices=QUANTIZATIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with open_checkpoint(demo_model_path()) as checkpoint:
        if arguments.memory_of:
            print(taken_bytes(checkpoint, arguments.memory_of))
            return
        console = Console(width=120)
        show_speeds(checkpoint, arguments.rounds, console)
        show_wires(checkpoint, console)


def show_speeds(checkpoint: Checkpoint, rounds: int, console: Console) -> None:
    span = Span(0, checkpoint.block_count)
    head, tokens = load_head(checkpoint), text_tokens(checkpoint)
    rows: dict[str, list[str]] = defaultdict(list)
    engines, plain = {}, None
    for quantize in QUANTIZATIONS:
        model = load_span(checkpoint, span, attention="sdpa", quantize=quantize)
        predictions = log_probabilities(head, [model], tokens)
        plain = predictions if plain is None else plain
        rows["a block, MiB"].append(f"{block_bytes(checkpoint, checkpoint.dtype, quantize) / 2**20:.2f}")
        rows[f"{len(span)} blocks, MiB resident"].append(f"{measured_memory(quantize) / 2**20:.0f}")
        rows[f"perplexity over {len(tokens)} tokens"].append(f"{perplexity(predictions, tokens):.3f}")
        rows["KL divergence, nats a token"].append(f"{divergence(plain, predictions):.4f}")
        rows["same likeliest token"].append(f"{agreement(plain, predictions):.1%}")
        model = load_span(checkpoint, span, attention=register_attention(), quantize=quantize)
        engines[quantize] = Engine(model, kv_tokens=2 * PREFILL_TOKENS + 1024)
    best: dict[tuple[str, str], float] = {}
    for number in range(rounds):
        console.log(f"round {number + 1} of {rounds}")
        for quantize, engine in engines.items():
            for name, rate in speeds(engine).items():
                best[name, quantize] = max(rate, best.get((name, quantize), 0.0))
    for name, quantize in best:
        rows[name].append(f"{best[name, quantize]:.1f}")
    table = Table("", *QUANTIZATIONS, title="SmolLM2-135M-Instruct, fp32, one thread; tokens a second of its CPU time")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)


def show_wires(checkpoint: Checkpoint, console: Console) -> None:
    half = checkpoint.block_count // 2
    hops = [load_span(checkpoint, span) for span in (Span(0, half), Span(half, checkpoint.block_count))]
    head, tokens = load_head(checkpoint), text_tokens(checkpoint)
    plain = log_probabilities(head, hops, tokens)
    table = Table("codec", "perplexity", "KL divergence", "same likeliest token", title="two hops, plain weights, fp32")
    for codec, dtype in WIRES:
        found = log_probabilities(head, hops, tokens, codec=codec, wire_dtype=dtype)
        cells = (
            f"{perplexity(found, tokens):.4f}",
            f"{divergence(plain, found):.6f}",
            f"{agreement(plain, found):.1%}",
        )
        table.add_row(f"{codec} {str(dtype).removeprefix('torch.')}", *cells)
    console.print(table)


def speeds(engine: Engine) -> dict[str, float]:
    """Measure tokens a second, once."""
    hidden = torch.randn(PREFILL_TOKENS, engine.hidden_size)
    found = {}
    for sessions in SESSIONS:
        for session in range(sessions):
            engine.open(session, SessionSize(CONTEXT_TOKENS + 1, max_rollback=1))
            submit(engine, session, 0, hidden[:CONTEXT_TOKENS])
        run_all(engine)
        seconds = min(decode_s(engine, sessions, hidden[-1:]) for _ in range(TURNS))
        found[f"decode, {sessions} session{'s' if sessions > 1 else ''}, tokens/s"] = sessions / seconds
        for session in range(sessions):
            engine.close(session)
    engine.open("prompt", SessionSize(PREFILL_TOKENS))
    began = time.thread_time()
    submit(engine, "prompt", 0, hidden)
    run_all(engine)
    found[f"prefill of {PREFILL_TOKENS}, tokens/s"] = PREFILL_TOKENS / (time.thread_time() - began)
    engine.close("prompt")
    return found


def decode_s(engine: Engine, sessions: int, hidden: torch.Tensor) -> float:
    """Seconds for one more position of each session. The position is rolled back each time, so the context keeps its
    length.
    """
    began = time.thread_time()
    for session in range(sessions):
        submit(engine, session, CONTEXT_TOKENS, hidden)
    run_all(engine)
    return time.thread_time() - began


def submit(engine: BaseEngine, session: int | str, start: int, hidden: torch.Tensor) -> None:
    engine.submit(EngineStep(session, 1, (), (RowSlice(0, start, len(hidden)),), hidden))


def run_all(engine: BaseEngine) -> None:
    while batch := engine.plan():
        engine.collect(batch, engine.run(batch))


def measured_memory(quantize: str) -> int:
    """Bytes that the whole span takes in a process of its own, beyond what the imports take."""
    command = [sys.executable, "-m", "benchmarks.compute.quantization_bench", "--memory-of", quantize]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def taken_bytes(checkpoint: Checkpoint, quantize: str) -> int:
    load_span(checkpoint, Span(0, 1), attention=register_attention(), quantize=quantize)
    trim_heap()
    before = resident_bytes()
    span = Span(0, checkpoint.block_count)
    engine = Engine(load_span(checkpoint, span, attention=register_attention(), quantize=quantize), kv_tokens=16)
    trim_heap()
    assert engine.span == span
    return resident_bytes() - before


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024


if __name__ == "__main__":
    main()
