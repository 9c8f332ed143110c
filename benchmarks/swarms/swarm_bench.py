"""`make bench`: compares local Transformers with peerd with 1, 2 and 3 servers, on this machine, in one run.

Every process has one compute thread. Figures are medians of rounds in which all variants take turns, so that a slow
moment of the machine affects all of them. Absolute times differ between machines, so compare within a table.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trio
from rich.console import Console
from rich.table import Table

from peerd.cli.demo import even_spans
from peerd.cli.processes import PeerProcess, PeerProcesses, open_peer_processes
from peerd.client.model import SwarmModel
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.compute.transformers_compat import cache_argument
from peerd.peer import open_peer

PROMPT_TOKENS = 32
DECODE_TOKENS = 64
PREFILL_TOKENS = 512
SESSIONS = (1, 4, 8, 16)
SERVERS = (1, 2, 3)
# As the local Transformers beside them computes.
FLOAT32 = ("--quantize", "none")
DECODE = "decode, tokens/s"
FIRST = f"first token of {PREFILL_TOKENS}, s"
SUM = "{} sessions, sum of tokens/s"


@dataclass(frozen=True)
class Variant:
    """One column of the table: how to run it, and the server processes behind it."""

    name: str
    model: SwarmModel
    servers: tuple[PeerProcess, ...]


class Local:
    """Transformers on the same weights, greedy, with its own cache: what a user without a swarm would run."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        self.model = model.eval()

    @torch.inference_mode()
    def token_times(self, prompt: list[int], count: int) -> tuple[float, float]:
        """Return the seconds to the first token, and the seconds for each token after it."""
        started = time.perf_counter()
        name = cache_argument(self.model.forward)
        output = self.model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        token = int(output.logits[0, -1].argmax())
        first = time.perf_counter()
        for _ in range(count - 1):
            output = self.model(input_ids=torch.tensor([[token]]), **{name: output[name]})
            token = int(output.logits[0, -1].argmax())
        return first - started, (time.perf_counter() - first) / max(count - 1, 1)


async def remote_times(model: SwarmModel, prompt: list[int], count: int) -> tuple[float, float]:
    """Return the same figures through the swarm."""
    generation = model.generate(prompt, temperature=0.0, max_new_tokens=count, eos_token_ids=(), speculate=False)
    async for _ in generation:
        pass
    rate = generation.tokens_per_second
    return generation.time_to_first_token_s or 0.0, 1 / rate if rate else 0.0


async def together(model: SwarmModel, prompts: list[list[int]], count: int) -> float:
    """Return the tokens a second of all sessions together, without their prefills."""
    began: list[float] = []
    ended: list[float] = []
    everybody = trio.Event()

    async def one(prompt: list[int]) -> None:
        generation = model.generate(
            prompt, temperature=0.0, max_new_tokens=count + 1, eos_token_ids=(), speculate=False
        )
        async for token in generation:
            if token.position == len(prompt):
                began.append(time.perf_counter())
                if len(began) == len(prompts):
                    everybody.set()
                await everybody.wait()
        ended.append(time.perf_counter())

    async with trio.open_nursery() as nursery:
        for prompt in prompts:
            nursery.start_soon(one, prompt)
    return len(prompts) * count / (max(ended) - max(began))


def prompts_of(count: int, length: int) -> list[list[int]]:
    """Make prompts that differ from their first token on."""
    generator = torch.Generator().manual_seed(count * length)
    return [torch.randint(100, 40000, (length,), generator=generator).tolist() for _ in range(count)]


def memory_mib(pid: int) -> float:
    """A process's memory, with its share of shared pages (PSS)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no Pss in smaps_rollup")


@asynccontextmanager
async def swarm(
    processes: PeerProcesses, path: Path, blocks: int, servers: int, *options: str
) -> AsyncIterator[Variant]:
    """Start a swarm whose servers have these options too, by default FLOAT32, and a client in this process."""
    bootstrap = await processes.start()
    started: list[PeerProcess] = []
    for span in even_spans(blocks, servers):
        started.append(
            await processes.start(
                *("--serve-blocks", str(span), "--model", str(path), "--bootstrap", str(bootstrap.address)),
                *(options or FLOAT32),
            )
        )
    async with open_peer(bootstrap=[bootstrap.address]) as peer, peer.model(path) as model:
        yield Variant(f"{servers} server{'s' if servers > 1 else ''}", model, tuple(started))


async def start_to_first_token(processes: PeerProcesses, path: Path) -> float:
    """Seconds from a server's start to the first token that it served; its client was already running."""
    bootstrap = await processes.start()
    async with open_peer(bootstrap=[bootstrap.address]) as peer, peer.model(path) as model:
        started = time.perf_counter()
        serve = ("--serve-blocks", "auto", "--model", str(path), "--bootstrap", str(bootstrap.address))
        await processes.start(*serve, *FLOAT32)
        await remote_times(model, prompts_of(1, 4)[0], 1)
        return time.perf_counter() - started


class Samples:
    """Figures by row and column, one for each round."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def note(self, column: str, row: str, value: float) -> None:
        self.rows[row][column].append(value)

    def median(self, row: str, column: str) -> float:
        return statistics.median(self.rows[row][column])

    def ratio(self, row: str, column: str, other: str) -> float:
        """The median of the ratios of each round: a slow moment of the machine affects both sides of a ratio."""
        pairs = zip(self.rows[row][column], self.rows[row][other], strict=True)
        return statistics.median(one / two for one, two in pairs)


async def measure(rounds: int, console: Console) -> Samples:
    path = demo_model_path()
    local = Local(path)
    samples = Samples()
    async with open_peer_processes(threads=1) as processes, AsyncExitStack() as stack:
        blocks = local.model.config.num_hidden_layers
        variants = [await stack.enter_async_context(swarm(processes, path, blocks, count)) for count in SERVERS]
        await alone(local, variants, Samples(), DECODE_TOKENS // 8)
        for number in range(1, rounds + 1):
            console.log(f"one session, round {number} of {rounds}")
            await alone(local, variants, samples, DECODE_TOKENS)
        for number in range(1, rounds // 2 + 1):
            console.log(f"many sessions, round {number} of {rounds // 2}")
            for variant, count in itertools.product(variants, SESSIONS):
                rate = await together(variant.model, prompts_of(count, PROMPT_TOKENS), DECODE_TOKENS)
                samples.note(variant.name, SUM.format(count), rate)
        for variant in variants:
            for server in variant.servers:
                samples.note(variant.name, "memory a server, MiB", memory_mib(server.process.pid))
        for _ in range(rounds // 2):
            samples.note("1 server", "server start to first token, s", await start_to_first_token(processes, path))
    return samples


async def alone(local: Local, variants: list[Variant], samples: Samples, tokens: int) -> None:
    """Measure one session at a time; the variants take turns."""
    prompt, long = prompts_of(1, PROMPT_TOKENS)[0], prompts_of(1, PREFILL_TOKENS)[0]
    samples.note("local", DECODE, 1 / local.token_times(prompt, tokens)[1])
    for variant in variants:
        samples.note(variant.name, DECODE, 1 / (await remote_times(variant.model, prompt, tokens))[1])
    samples.note("local", FIRST, local.token_times(long, 1)[0])
    for variant in variants:
        samples.note(variant.name, FIRST, (await remote_times(variant.model, long, 1))[0])


def show(samples: Samples, console: Console) -> None:
    columns = ["local", *(f"{count} server{'s' if count > 1 else ''}" for count in SERVERS)]
    table = Table("", *columns, title="SmolLM2-135M-Instruct, fp32, one thread a process, loopback; medians")
    for row, cells in samples.rows.items():
        table.add_row(row, *(f"{samples.median(row, c):.4g}" if c in cells else "" for c in columns))
    console.print(table)
    shares = ", ".join(f"{column} {samples.ratio(DECODE, column, 'local'):.2f}" for column in columns[1:])
    console.print(f"share of local decode speed: {shares}")
    rates = samples.rows[DECODE]
    hops = [1000 * (1 / three - 1 / one) / 2 for one, three in zip(rates["1 server"], rates["3 servers"], strict=True)]
    console.print(f"added by a hop: {statistics.median(hops):.2f} ms a token")
    for column in columns[1:]:
        one = samples.median(SUM.format(1), column)
        gains = ", ".join(f"{count}: {samples.median(SUM.format(count), column) / one:.1f}x" for count in SESSIONS[1:])
        console.print(f"sessions beside one, {column}: {gains}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    show(trio.run(measure, arguments.rounds, console), console)


if __name__ == "__main__":
    main()
