"""`make bench-api`: compares streams through the local API with the same sessions through the library, on this machine.

One server process has all blocks of SmolLM2-135M-Instruct. The daemon runs in a process of its own; its HTTP client and
the library's client run in this process. Both ways take turns in every round, so compare figures within a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import httpx
import torch
import trio
from rich.console import Console
from rich.table import Table

from peerd.cli.processes import open_peer_processes
from peerd.client.model import SwarmModel
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.peer import open_peer

STREAMS = (1, 4, 16)
TOKENS = 64
PROMPT_TOKENS = 32


class Race:
    """Measures several streams from the moment when each of them has its first token."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._began: list[float] = []
        self._ended: list[float] = []

    def first(self) -> None:
        self._began.append(time.perf_counter())

    def last(self) -> None:
        self._ended.append(time.perf_counter())

    @property
    def rate(self) -> float:
        """Tokens a second of all streams together, from the last stream's first token to the first stream's last
        token.
        """
        return self._count * TOKENS / (max(self._ended) - min(self._began))


async def through_library(model: SwarmModel, prompts: list[list[int]]) -> float:
    race = Race(len(prompts))

    async def one(prompt: list[int]) -> None:
        seen = 0
        async for _ in model.generate(prompt, temperature=0.0, max_new_tokens=TOKENS + 1, eos_token_ids=()):
            seen += 1
            if seen == 1:
                race.first()
        race.last()

    async with trio.open_nursery() as nursery:
        for prompt in prompts:
            nursery.start_soon(one, prompt)
    return race.rate


async def through_socket(client: httpx.AsyncClient, prompts: list[list[int]]) -> float:
    race = Race(len(prompts))

    async def one(prompt: list[int]) -> None:
        # The library is told to go on after an end-of-answer token. The API cannot do that, so this request bans the
        # token.
        asked = {"model": "smol", "prompt": prompt, "max_tokens": TOKENS + 1, "temperature": 0, "stream": True}
        seen = 0
        async with client.stream(
            "POST", "/v1/completions", json=asked | {"logit_bias": {"0": -100, "2": -100}}
        ) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    assert "error" not in json.loads(line[6:])
                    seen += 1
                    if seen == 1:
                        race.first()
        assert seen == TOKENS + 1, seen
        race.last()

    async with trio.open_nursery() as nursery:
        for prompt in prompts:
            nursery.start_soon(one, prompt)
    return race.rate


async def measure(rounds: int, console: Console) -> dict[int, dict[str, list[float]]]:
    path = demo_model_path()
    figures: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "peerd.sock"
        async with open_peer_processes(threads=1) as processes:
            bootstrap = await processes.start()
            join = ["--bootstrap", str(bootstrap.address)]
            await processes.start("--serve-blocks", "auto", "--model", str(path), *join)
            await processes.start("--client", "--model", f"smol={path}", "--socket", str(socket), *join)
            limits = httpx.Limits(max_connections=max(STREAMS))
            transport = httpx.AsyncHTTPTransport(uds=str(socket), limits=limits)
            async with (
                open_peer(bootstrap=[bootstrap.address]) as peer,
                peer.model(path) as model,
                httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client,
            ):
                for number in range(rounds + 1):
                    console.log(f"round {number} of {rounds}" if number else "warming up")
                    for count in STREAMS:
                        generator = torch.Generator().manual_seed(count)
                        prompts = torch.randint(100, 40000, (count, PROMPT_TOKENS), generator=generator).tolist()
                        library = await through_library(model, prompts)
                        local = await through_socket(client, prompts)
                        if number:
                            figures[count]["library"].append(library)
                            figures[count]["socket"].append(local)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    figures = trio.run(measure, arguments.rounds, console)
    table = Table("streams", "library, tokens/s", "local API, tokens/s", "share", title="SmolLM2-135M, fp32; medians")
    for count, rates in figures.items():
        shares = [one / two for one, two in zip(rates["socket"], rates["library"], strict=True)]
        medians = [statistics.median(rates[name]) for name in ("library", "socket")]
        table.add_row(str(count), *(f"{value:.4g}" for value in medians), f"{statistics.median(shares):.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
