"""`make bench-packed`: a GGUF file's weights kept packed beside the same in float32, with SmolLM2-135M's Q4_1.

It measures products of single matrices, the engine alone, a swarm of one server, and how far predictions move. Every
process has one compute thread. Packed and plain take turns, so that a slow moment of the machine affects both; ratios
are those of a round, and of products the fastest of some turns count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

import torch
import trio
from rich.console import Console
from rich.table import Table

from benchmarks.compute.quantization_bench import CONTEXT_TOKENS, PREFILL_TOKENS, decode_s, run_all, submit
from benchmarks.quality import agreement, divergence, log_probabilities, perplexity, text_tokens
from benchmarks.swarms.swarm_bench import (
    DECODE_TOKENS,
    PROMPT_TOKENS,
    Samples,
    memory_mib,
    prompts_of,
    remote_times,
    swarm,
    together,
)
from peerd.cli.processes import open_peer_processes
from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.capacity import block_bytes
from peerd.compute.engine.engine import Engine
from peerd.compute.model.head import load_head
from peerd.compute.model.span_model import load_span
from peerd.compute.quantized.group_matrix import Choice, GroupMatrix
from peerd.compute.quantized.groups import group_form
from peerd.compute.quantized.modules import matrices_in
from peerd.compute.quantized.product_choice import NO_LIMIT
from peerd.protocol.rows import SessionSize
from peerd.protocol.span import Span

PLAIN, PACKED = "none", "packed"
SESSIONS = (1, 4, 16)
#: In features and out features: SmolLM2's, and those of a model of 7 billion parameters.
SHAPES = ((576, 576), (576, 1536), (1536, 576), (4096, 4096), (4096, 11008))
ROWS = (1, 4, 16, 128)
# Together as large that they are read from memory, and not from a core's cache.
PRODUCTS_BYTES = 48 << 20
DECODE, FIRST, MEMORY = "decode, {} at once, sum of tokens/s", f"first token of {PREFILL_TOKENS}, s", "memory, MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=PARTS, help="only this part")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    for name, part in PARTS.items():
        if arguments.part in (None, name):
            part(arguments.rounds, console)


def products(rounds: int, console: Console) -> None:
    """Products of one matrix, in billions of weights times rows a second."""
    table = Table("in x out, rows", *(way for way, _ in WAYS), title="10^9 weights x rows a second, one thread")
    for columns, rows in SHAPES:
        count = max(1, PRODUCTS_BYTES // (4 * columns * rows))
        weights = Weights([torch.randn(rows, columns) for _ in range(count)])
        for n in ROWS:
            x = torch.randn(n, columns)
            with torch.inference_mode():
                turns = [[seconds(partial(way, weights, x)) for _, way in WAYS] for _ in range(rounds)]
            best = [min(times) for times in zip(*turns, strict=True)]
            work = count * columns * rows * n / 1e9
            table.add_row(f"{columns} x {rows}, {n}", *(f"{work / each:.1f}" for each in best))
    console.print(table)


class Weights:
    """The same matrices, stored in each way."""

    def __init__(self, plain: list[torch.Tensor]) -> None:
        self.plain = plain
        self.half = [weight.bfloat16() for weight in plain]
        self.packed = {bits: [stored(bits, weight) for weight in plain] for bits in (4, 8)}


def dense(weights: Weights, x: torch.Tensor, *, half: bool) -> None:
    x = x.bfloat16() if half else x
    for weight in weights.half if half else weights.plain:
        torch.nn.functional.linear(x, weight)


def by_kernel(weights: Weights, x: torch.Tensor, *, bits: int) -> None:
    for matrix in weights.packed[bits]:
        matrix.by_kernel(x)


def by_slices(weights: Weights, x: torch.Tensor, *, bits: int) -> None:
    for matrix in weights.packed[bits]:
        matrix.by_slices(x, torch.bfloat16)


WAYS: tuple[tuple[str, Callable[[Weights, torch.Tensor], None]], ...] = (
    ("float32", partial(dense, half=False)),
    ("bfloat16", partial(dense, half=True)),
    ("int4 kernel", partial(by_kernel, bits=4)),
    ("int4 slices", partial(by_slices, bits=4)),
    ("int8 kernel", partial(by_kernel, bits=8)),
    ("int8 slices", partial(by_slices, bits=8)),
)


def engines(rounds: int, console: Console) -> None:
    """The engine over all blocks, without network and head."""
    samples = Samples()
    with open_checkpoint(demo_model_path()) as checkpoint:
        span = Span(0, checkpoint.block_count)
        both = {
            quantize: Engine(
                load_span(checkpoint, span, attention=register_attention(), quantize=quantize), kv_tokens=4096
            )
            for quantize in (PLAIN, PACKED)
        }
        for quantize in both:
            samples.note(
                quantize, "a block's weights, MiB", block_bytes(checkpoint, checkpoint.dtype, quantize) / 2**20
            )
    for _ in range(rounds):
        for quantize, engine in both.items():
            for count in SESSIONS:
                samples.note(quantize, DECODE.format(count), count / fastest_decode_s(engine, count))
            samples.note(quantize, FIRST, prefill_s(engine))
    show(samples, "the engine alone, CPU time of its thread", console)


def servers(rounds: int, console: Console) -> None:
    """A server of all blocks, and a client with the head, each in a process of its own."""
    trio.run(_servers, rounds, console)


async def _servers(rounds: int, console: Console) -> None:
    samples, path = Samples(), demo_model_path()
    with open_checkpoint(path) as checkpoint:
        blocks = checkpoint.block_count
    async with open_peer_processes(threads=1) as processes, AsyncExitStack() as stack:
        both = {
            quantize: await stack.enter_async_context(swarm(processes, path, blocks, 1, "--quantize", quantize))
            for quantize in (PLAIN, PACKED)
        }
        for number in range(rounds + 1):
            # The first round warms up.
            noted = samples if number else Samples()
            for quantize, variant in both.items():
                seconds_a_token = (await remote_times(variant.model, prompts_of(1, PROMPT_TOKENS)[0], DECODE_TOKENS))[1]
                noted.note(quantize, DECODE.format(1), 1 / seconds_a_token)
                for count in SESSIONS[1:]:
                    rate = await together(variant.model, prompts_of(count, PROMPT_TOKENS), DECODE_TOKENS)
                    noted.note(quantize, DECODE.format(count), rate)
                first = (await remote_times(variant.model, prompts_of(1, PREFILL_TOKENS)[0], 1))[0]
                noted.note(quantize, FIRST, first)
        for quantize, variant in both.items():
            samples.note(quantize, MEMORY, memory_mib(variant.servers[0].process.pid))
    show(samples, "one server and a client over loopback", console)


def quality(rounds: int, console: Console) -> None:
    """Predictions of `fixed_text.txt`, beside those of the file's own values in float32."""
    ways = {"kernel": Choice(NO_LIMIT), "slices in float32": Choice(0), "slices in bfloat16": Choice(0, in_bf16=True)}
    table = Table("", "perplexity", "KL, nats a token", "same likeliest token")
    with open_checkpoint(demo_model_path()) as checkpoint:
        head, tokens, span = load_head(checkpoint), text_tokens(checkpoint), Span(0, checkpoint.block_count)
        wanted = log_probabilities(head, [load_span(checkpoint, span)], tokens)
        table.add_row("float32", f"{perplexity(wanted, tokens):.3f}")
        packed = load_span(checkpoint, span, quantize=PACKED)
        for name, choice in ways.items():
            for matrix in matrices_in(packed):
                assert isinstance(matrix, GroupMatrix)
                matrix.choice = choice
            found = log_probabilities(head, [packed], tokens)
            cells = f"{perplexity(found, tokens):.3f}", f"{divergence(wanted, found):.5f}"
            table.add_row(f"packed, {name}", *cells, f"{agreement(wanted, found):.1%}")
    console.print(table)


PARTS: dict[str, Callable[[int, Console], None]] = {
    "products": products,
    "engines": engines,
    "servers": servers,
    "quality": quality,
}


def stored(bits: int, weight: torch.Tensor) -> GroupMatrix:
    form = group_form(bits, 32)
    values, scales = form.empty((weight.shape[0], weight.shape[1]), torch.device("cpu"))
    matrix = GroupMatrix(form, values[0], scales[0], (weight.shape[0], weight.shape[1]), torch.float32)
    matrix.store(weight)
    return matrix


def seconds(way: Callable[[], object]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def fastest_decode_s(engine: Engine, sessions: int) -> float:
    """Seconds for one more position of each session, the fastest of a few turns."""
    hidden = torch.randn(CONTEXT_TOKENS, engine.hidden_size)
    for session in range(sessions):
        engine.open(session, SessionSize(CONTEXT_TOKENS + 1, max_rollback=1))
        submit(engine, session, 0, hidden)
    run_all(engine)
    best = min(decode_s(engine, sessions, hidden[-1:]) for _ in range(4))
    for session in range(sessions):
        engine.close(session)
    return best


def prefill_s(engine: Engine) -> float:
    """Seconds of the engine's thread for a whole prompt."""
    engine.open("prompt", SessionSize(PREFILL_TOKENS))
    hidden = torch.randn(PREFILL_TOKENS, engine.hidden_size)
    began = time.thread_time()
    submit(engine, "prompt", 0, hidden)
    run_all(engine)
    engine.close("prompt")
    return time.thread_time() - began


def show(samples: Samples, title: str, console: Console) -> None:
    table = Table("", "float32", "packed", "packed / float32", title=title)
    for row, cells in samples.rows.items():
        medians = (f"{statistics.median(cells[quantize]):.4g}" for quantize in (PLAIN, PACKED))
        table.add_row(row, *medians, f"{samples.ratio(row, PACKED, PLAIN):.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
