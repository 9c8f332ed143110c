"""`make bench`: local Transformers beside peerd with 1, 2 and 3 servers, on this machine, in one run.

Every process has one compute thread; figures are medians of rounds in which all variants take turns, so that
a machine that slows down slows them all. Absolute times vary between machines: compare within a table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import trio
from rich.console import Console
from rich.table import Table

from peerd.compute.demo_model import demo_model_path
from peerd.demo import even_spans
from peerd.model import RemoteModel
from peerd.peer import open_peer
from peerd.processes import PeerProcess, PeerProcesses, open_peer_processes

PROMPT_TOKENS = 32
DECODE_TOKENS = 64
PREFILL_TOKENS = 512
SESSIONS = (1, 4, 8, 16)
SERVERS = (1, 2, 3)


@dataclass(frozen=True)
class Variant:
    """One column: how to run it, and the server processes behind it."""

    name: str
    model: RemoteModel
    servers: tuple[PeerProcess, ...]


class Local:
    """Transformers on the same weights, greedy, with its own cache: what a user without a swarm would run."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()

    @torch.inference_mode()
    def token_times(self, prompt: list[int], count: int) -> tuple[float, float]:
        """Seconds to the first token, and for each token after it."""
        started = time.perf_counter()
        output = self.model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        token = int(output.logits[0, -1].argmax())
        first = time.perf_counter()
        for _ in range(count - 1):
            output = self.model(input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values)
            token = int(output.logits[0, -1].argmax())
        return first - started, (time.perf_counter() - first) / max(count - 1, 1)


async def remote_times(model: RemoteModel, prompt: list[int], count: int) -> tuple[float, float]:
    """The same through the swarm."""
    generation = model.generate(prompt, temperature=0.0, max_new_tokens=count, eos_token_ids=())
    async for _ in generation:
        pass
    rate = generation.tokens_per_second
    return generation.time_to_first_token_s or 0.0, 1 / rate if rate else 0.0


async def together(model: RemoteModel, prompts: list[list[int]], count: int) -> float:
    """Tokens a second that so many sessions at once get in sum, their prefills left out."""
    began: list[float] = []
    ended: list[float] = []
    everybody = trio.Event()

    async def one(prompt: list[int]) -> None:
        generation = model.generate(prompt, temperature=0.0, max_new_tokens=count + 1, eos_token_ids=())
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
    """Prompts that differ from their first token on."""
    generator = torch.Generator().manual_seed(count * length)
    return [torch.randint(100, 40000, (length,), generator=generator).tolist() for _ in range(count)]


def memory_mib(pid: int) -> float:
    """A process's memory, with its share of shared pages (PSS)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no Pss in smaps_rollup")


@asynccontextmanager
async def swarm(processes: PeerProcesses, path: Path, blocks: int, servers: int) -> AsyncIterator[Variant]:
    """A swarm of its own, and a client in this process."""
    bootstrap = await processes.start()
    started: list[PeerProcess] = []
    for span in even_spans(blocks, servers):
        started.append(
            await processes.start(
                "--serve-blocks", str(span), "--model", str(path), "--bootstrap", str(bootstrap.address)
            )
        )
    async with open_peer(bootstrap=[bootstrap.address]) as peer, peer.model(path) as model:
        yield Variant(f"{servers} server{'s' if servers > 1 else ''}", model, tuple(started))


async def start_to_first_token(processes: PeerProcesses, path: Path) -> float:
    """Seconds from a server's start to the first token it served, its client running already."""
    bootstrap = await processes.start()
    async with open_peer(bootstrap=[bootstrap.address]) as peer, peer.model(path) as model:
        started = time.perf_counter()
        await processes.start("--serve-blocks", "auto", "--model", str(path), "--bootstrap", str(bootstrap.address))
        await remote_times(model, prompts_of(1, 4)[0], 1)
        return time.perf_counter() - started


async def measure(rounds: int, console: Console) -> dict[str, dict[str, float]]:
    path = demo_model_path()
    local = Local(path)
    blocks = local.model.config.num_hidden_layers
    samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def note(column: str, row: str, value: float) -> None:
        samples[row][column].append(value)

    async with open_peer_processes(threads=1) as processes, AsyncExitStack() as stack:
        variants = [await stack.enter_async_context(swarm(processes, path, blocks, count)) for count in SERVERS]
        prompt, long = prompts_of(1, PROMPT_TOKENS)[0], prompts_of(1, PREFILL_TOKENS)[0]
        for round_ in range(rounds + 1):
            counted = round_ > 0
            console.log(f"round {round_} of {rounds}" if counted else "warm-up")
            record: Callable[[str, str, float], None] = note if counted else lambda *_: None
            record("local", "decode, tokens/s", 1 / local.token_times(prompt, DECODE_TOKENS)[1])
            record("local", f"first token of {PREFILL_TOKENS}, s", local.token_times(long, 1)[0])
            for variant in variants:
                record(
                    variant.name, "decode, tokens/s", 1 / (await remote_times(variant.model, prompt, DECODE_TOKENS))[1]
                )
                record(
                    variant.name, f"first token of {PREFILL_TOKENS}, s", (await remote_times(variant.model, long, 1))[0]
                )
                for count in SESSIONS:
                    rate = await together(variant.model, prompts_of(count, PROMPT_TOKENS), DECODE_TOKENS)
                    record(variant.name, f"{count} sessions, sum of tokens/s", rate)
        for variant in variants:
            note(
                variant.name,
                "memory a server, MiB",
                statistics.mean(memory_mib(s.process.pid) for s in variant.servers),
            )
        for _ in range(rounds):
            note("1 server", "server start to first token, s", await start_to_first_token(processes, path))
    return {
        row: {column: statistics.median(values) for column, values in cells.items()} for row, cells in samples.items()
    }


def show(figures: dict[str, dict[str, float]], console: Console) -> None:
    columns = ["local", "1 server", "2 servers", "3 servers"]
    table = Table("", *columns, title="SmolLM2-135M-Instruct, fp32, one thread a process, loopback; medians")
    for row, cells in figures.items():
        table.add_row(row, *(f"{cells[column]:.4g}" if column in cells else "" for column in columns))
    console.print(table)
    decode = figures["decode, tokens/s"]
    shares = {column: decode[column] / decode["local"] for column in columns[1:]}
    console.print(f"share of local decode speed: {', '.join(f'{c} {shares[c]:.2f}' for c in shares)}")
    hop_ms = 1000 * (1 / decode["3 servers"] - 1 / decode["1 server"]) / 2
    console.print(f"added by a hop: {hop_ms:.2f} ms a token")
    for column in columns[1:]:
        one = figures["1 sessions, sum of tokens/s"][column]
        gains = ", ".join(f"{n}: {figures[f'{n} sessions, sum of tokens/s'][column] / one:.1f}x" for n in SESSIONS[1:])
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
