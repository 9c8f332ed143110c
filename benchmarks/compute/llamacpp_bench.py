"""`make bench-llamacpp`: a GGUF file's blocks computed by llama.cpp beside the same in our own engine, packed.

It measures the engine alone, a swarm of one server and of two, and how far predictions move. Beside both stands
llama.cpp with the whole model, as its own program decodes it: tokens in, logits out. Every process has one compute
thread. All take turns, so that a slow moment of the machine affects each; ratios are those of a round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trio
from rich.console import Console
from rich.table import Table

from benchmarks.compute.packed_bench import DECODE, FIRST, MEMORY, SESSIONS
from benchmarks.compute.quantization_bench import CONTEXT_TOKENS, PREFILL_TOKENS, run_all, submit
from benchmarks.quality import agreement, divergence, perplexity, text_tokens
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
from peerd.compute.engine.engine import BaseEngine, Engine
from peerd.compute.llamacpp.library import load_library, package_version
from peerd.compute.llamacpp.loading import load_llama_engine
from peerd.compute.llamacpp.structs import FLASH_ATTENTION, Batch, with_values
from peerd.compute.model.head import load_head
from peerd.compute.model.span_model import load_span
from peerd.protocol.rows import SessionSize
from peerd.protocol.span import Span

TORCH, LLAMACPP, ALONE = "torch, packed", "llama.cpp", "llama.cpp's own"
ENGINES = {TORCH: ("--engine", "torch"), LLAMACPP: ("--engine", "llamacpp")}
KV_TOKENS = 8192
TURNS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=PARTS, help="only this part")
    parser.add_argument("--model", type=Path, help="another GGUF file than SmolLM2's")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    console.print(f"xllamacpp {package_version()}: {load_library().instructions}")
    for name, part in PARTS.items():
        if arguments.part in (None, name):
            part(arguments.model or demo_model_path(), arguments.rounds, console)


class WholeModel:
    """The unmodified file in llama.cpp, by itself. `clock` says what its seconds are: of its thread, or of the wall."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock
        library = load_library()
        calls = self._calls = library.calls
        self._model = calls.llama_model_load_from_file(
            bytes(path), with_values(calls.llama_model_default_params(), n_gpu_layers=0)
        )
        params = with_values(
            calls.llama_context_default_params(),
            n_ctx=KV_TOKENS,
            n_batch=PREFILL_TOKENS,
            n_ubatch=PREFILL_TOKENS,
            n_seq_max=max(SESSIONS),
            n_threads=1,
            n_threads_batch=1,
            flash_attn_type=FLASH_ATTENTION,
            kv_unified=True,
        )
        self._context = calls.llama_init_from_model(self._model, params)
        self._memory = calls.llama_get_memory(self._context)

    def run(self, positions: Sequence[int], sequences: Sequence[int], *, last_only: bool = False) -> None:
        """Compute a token at each of these positions, with logits of each, or of the last."""
        count = len(positions)
        tokens, places = np.full(count, 100, np.int32), np.asarray(positions, np.int32)
        ids, ones = np.asarray(sequences, np.int32), np.ones(count, np.int32)
        wanted = np.ones(count, np.int8)
        wanted[: count - 1 if last_only else 0] = 0
        pointers = (ids.ctypes.data + 4 * np.arange(count)).astype(np.uintp)
        arrays: list[Any] = [array.ctypes.data for array in (places, ones, pointers, wanted)]
        code = self._calls.llama_decode(self._context, Batch(count, tokens.ctypes.data, None, *arrays))
        assert code == 0

    def decode_s(self, sessions: int) -> float:
        """Seconds for one more token of each session, the fastest of a few turns."""
        for session in range(sessions):
            self.run(range(CONTEXT_TOKENS), [session] * CONTEXT_TOKENS, last_only=True)
        best = min(self._timed([CONTEXT_TOKENS + turn] * sessions, range(sessions)) for turn in range(TURNS))
        self._forget(sessions)
        return best

    def first_s(self) -> float:
        """Seconds for a whole prompt."""
        took = self._timed(range(PREFILL_TOKENS), [0] * PREFILL_TOKENS, last_only=True)
        self._forget(1)
        return took

    def _timed(self, positions: Sequence[int], sequences: Sequence[int], *, last_only: bool = False) -> float:
        began = self._clock()
        self.run(positions, sequences, last_only=last_only)
        return self._clock() - began

    def _forget(self, sessions: int) -> None:
        for session in range(sessions):
            self._calls.llama_memory_seq_rm(self._memory, session, -1, -1)


def engines(path: Path, rounds: int, console: Console) -> None:
    """The engine over all blocks, without network and head; llama.cpp's own with its head."""
    samples, alone = Samples(), WholeModel(path)
    with open_checkpoint(path) as checkpoint:
        span = Span(0, checkpoint.block_count)
        packed = load_span(checkpoint, span, attention=register_attention(), quantize="packed")
        both: dict[str, BaseEngine] = {
            TORCH: Engine(packed, kv_tokens=KV_TOKENS),
            LLAMACPP: load_llama_engine(checkpoint, span, kv_tokens=KV_TOKENS),
        }
    for _ in range(rounds):
        for name, engine in both.items():
            for count in SESSIONS:
                samples.note(name, DECODE.format(count), count / fastest_decode_s(engine, count))
            samples.note(name, FIRST, prefill_s(engine))
        for count in SESSIONS:
            samples.note(ALONE, DECODE.format(count), count / alone.decode_s(count))
        samples.note(ALONE, FIRST, alone.first_s())
    show(samples, f"{path.name}: the engine alone, CPU time of its thread", console)


def fastest_decode_s(engine: BaseEngine, sessions: int) -> float:
    """Seconds for one more position of each session, the fastest of a few turns."""
    hidden = torch.randn(CONTEXT_TOKENS, engine.hidden_size)
    for session in range(sessions):
        engine.open(session, SessionSize(CONTEXT_TOKENS + TURNS, max_rollback=1))
        submit(engine, session, 0, hidden)
    run_all(engine)
    times = []
    for turn in range(TURNS):
        began = time.thread_time()
        for session in range(sessions):
            submit(engine, session, CONTEXT_TOKENS + turn, hidden[:1])
        run_all(engine)
        times.append(time.thread_time() - began)
    for session in range(sessions):
        engine.close(session)
    return min(times)


def prefill_s(engine: BaseEngine) -> float:
    """Seconds of the engine's thread for a whole prompt."""
    engine.open("prompt", SessionSize(PREFILL_TOKENS))
    hidden = torch.randn(PREFILL_TOKENS, engine.hidden_size)
    began = time.thread_time()
    submit(engine, "prompt", 0, hidden)
    run_all(engine)
    engine.close("prompt")
    return time.thread_time() - began


def servers(path: Path, rounds: int, console: Console) -> None:
    """One server of all blocks, then two of half of them, and a client with the head, each in a process of its own."""
    for count in (1, 2):
        trio.run(_servers, path, count, rounds, console)


async def _servers(path: Path, count: int, rounds: int, console: Console) -> None:
    samples, alone = Samples(), WholeModel(path, time.perf_counter)
    with open_checkpoint(path) as checkpoint:
        blocks = checkpoint.block_count
    async with open_peer_processes(threads=1) as processes, AsyncExitStack() as stack:
        both = {
            name: await stack.enter_async_context(swarm(processes, path, blocks, count, *options))
            for name, options in ENGINES.items()
        }
        for number in range(rounds + 1):
            # The first round warms up.
            noted = samples if number else Samples()
            for name, variant in both.items():
                token_s = (await remote_times(variant.model, prompts_of(1, PROMPT_TOKENS)[0], DECODE_TOKENS))[1]
                noted.note(name, DECODE.format(1), 1 / token_s)
                for sessions in (*SESSIONS[1:-1], 8, SESSIONS[-1]):
                    rate = await together(variant.model, prompts_of(sessions, PROMPT_TOKENS), DECODE_TOKENS)
                    noted.note(name, DECODE.format(sessions), rate)
                first = (await remote_times(variant.model, prompts_of(1, PREFILL_TOKENS)[0], 1))[0]
                noted.note(name, FIRST, first)
            for sessions in (*SESSIONS[:-1], 8, SESSIONS[-1]):
                noted.note(ALONE, DECODE.format(sessions), sessions / alone.decode_s(sessions))
            noted.note(ALONE, FIRST, alone.first_s())
        for name, variant in both.items():
            samples.note(name, MEMORY, memory_mib(variant.servers[0].process.pid))
    show(samples, f"{count} server(s) and a client over loopback; llama.cpp's own in one process", console)


def quality(path: Path, rounds: int, console: Console) -> None:
    """Predictions of `fixed_text.txt`, beside those of the file's own values in float32."""
    table = Table("", "perplexity", "KL, nats a token", "same likeliest token")
    with open_checkpoint(path) as checkpoint, torch.inference_mode():
        head, tokens, span = load_head(checkpoint), text_tokens(checkpoint), Span(0, checkpoint.block_count)
        inputs = head.embed(tokens).float()

        def predicted(hidden: torch.Tensor) -> torch.Tensor:
            return head.logits(hidden).float().log_softmax(-1)

        wanted = predicted(load_span(checkpoint, span).forward_no_cache(inputs[None])[0])
        table.add_row("float32", f"{perplexity(wanted, tokens):.3f}")
        engine = load_llama_engine(checkpoint, span, kv_tokens=16, batch_tokens=len(tokens))
        ways = {
            TORCH: load_span(checkpoint, span, quantize="packed").forward_no_cache(inputs[None])[0],
            LLAMACPP: engine.forward(inputs[None])[0],
        }
        for name, hidden in ways.items():
            found = predicted(hidden)
            cells = f"{perplexity(found, tokens):.3f}", f"{divergence(wanted, found):.5f}"
            table.add_row(name, *cells, f"{agreement(wanted, found):.1%}")
    console.print(table)


PARTS = {"engines": engines, "servers": servers, "quality": quality}


def show(samples: Samples, title: str, console: Console) -> None:
    table = Table("", TORCH, LLAMACPP, ALONE, f"{LLAMACPP} / torch", f"{LLAMACPP} / its own", title=title)
    for row, cells in samples.rows.items():
        medians = (f"{samples.median(row, name):.4g}" if name in cells else "" for name in (TORCH, LLAMACPP, ALONE))
        own = f"{samples.ratio(row, LLAMACPP, ALONE):.2f}" if ALONE in cells else ""
        table.add_row(row, *medians, f"{samples.ratio(row, LLAMACPP, TORCH):.2f}", own)
    console.print(table)


if __name__ == "__main__":
    main()
