"""`make bench-chats`: 50 chats that stream at the same time through the local API, and as many through the library.

Real processes run on loopback: a bootstrap peer, two servers of half of SmolLM2-135M-Instruct each, and a daemon. Each
chat asks, reads the whole answer, and asks again, until the time is over. The library's chats run before and after, in
this process, so that a machine that slows down meanwhile shows. Every answer that is neither whole nor an honest 429
is an error. The memory of the processes is read every two seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
import trio
from rich.console import Console

from peerd.cli.demo import even_spans
from peerd.cli.processes import PeerProcess, ProcessEnded, open_peer_processes
from peerd.client.model import SwarmModel
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.peer import open_peer
from peerd.protocol.errors import Overloaded

BLOCKS = 30
SERVERS = 2
SAMPLE_S = 2.0
# What comes before is start: caches fill, and each process's heap grows to what this load needs.
WARM_UP_S = 30.0
TOPICS = ("bread", "the sea", "bees", "a bicycle", "winter", "maps", "tea", "a violin", "rain", "stars")


@dataclass
class Tally:
    """What the chats got. answers: how many were whole; refused: 429; errors: all else, by its words."""

    tokens: int = 0
    answers: int = 0
    refused: int = 0
    errors: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of a process in MiB: at the middle of the measured time's first and last third, and its most."""

    name: str
    first: float
    last: float
    most: float

    @property
    def growth(self) -> float:
        return self.last / self.first - 1


@dataclass(frozen=True, slots=True)
class Figures:
    chats: int
    seconds: float
    api: dict[str, Any]
    api_rate: float
    library_rates: tuple[float, float]
    memory: tuple[Memory, ...]

    @property
    def share(self) -> float:
        """The API's tokens a second, over the library's before and after."""
        return self.api_rate / statistics.mean(self.library_rates)


def question(chat: int, number: int) -> str:
    return f"Tell me something about {TOPICS[(chat + number) % len(TOPICS)]}, number {chat * 1000 + number}."


async def one_through_api(client: httpx.AsyncClient, tally: Tally, text: str, tokens: int) -> None:
    asked = {"model": "smol", "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": True}
    try:
        async with client.stream("POST", "/v1/chat/completions", json=asked | {"temperature": 0}) as answer:
            if answer.status_code != 200:
                await answer.aread()
                if answer.status_code == 429 and "retry-after" in answer.headers:
                    tally.refused += 1
                    await trio.sleep(float(answer.headers["retry-after"]))
                else:
                    tally.errors[f"{answer.status_code} {answer.text[:200]}"] += 1
                return
            seen, last = 0, ""
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                last = line.removeprefix("data: ")
                if last != "[DONE]":
                    event = json.loads(last)
                    if "error" in event:
                        tally.errors[str(event["error"])[:200]] += 1
                        return
                    seen += 1
                    tally.tokens += 1
            if last == "[DONE]" and seen:
                tally.answers += 1
            else:
                tally.errors["the stream ended without its end"] += 1
    except httpx.HTTPError as error:
        tally.errors[repr(error)[:200]] += 1


async def one_through_library(model: SwarmModel, tally: Tally, text: str, tokens: int) -> None:
    try:
        async for _ in model.generate(text, chat=True, max_new_tokens=tokens, temperature=0.0):
            tally.tokens += 1
        tally.answers += 1
    except Overloaded:
        tally.refused += 1
        await trio.sleep(1)


async def chat_for(seconds: float, chats: int, tally: Tally, one: Callable[[Tally, str], Awaitable[None]]) -> float:
    """Let so many chats go on for that long. Returns their tokens a second; answers that go on then do not count."""

    async def keep_asking(chat: int) -> None:
        number = 0
        while True:
            await one(tally, question(chat, number))
            number += 1

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for chat in range(chats):
            nursery.start_soon(keep_asking, chat)
        await trio.sleep(seconds)
        rate = tally.tokens / (trio.current_time() - began)
        nursery.cancel_scope.cancel()
    return rate


def resident_mib(process: PeerProcess) -> float:
    """The process's memory: without files that others map too, where the kernel tells them apart.

    Raises ProcessEnded.
    """
    if (code := process.process.poll()) is not None:
        raise ProcessEnded(f"{' '.join(process.arguments)} ended with {code}: {process.log.read_text()[-2000:]}")
    lines = dict(
        line.partition(":")[::2] for line in Path(f"/proc/{process.process.pid}/status").read_text().splitlines()
    )
    return int((lines.get("RssAnon") or lines["VmRSS"]).split()[0]) / 1024


async def watch_memory(
    processes: dict[str, PeerProcess], samples: dict[str, list[float]], task_status: trio.TaskStatus[trio.CancelScope]
) -> None:
    with trio.CancelScope() as scope:
        task_status.started(scope)
        while True:
            for name, process in processes.items():
                samples.setdefault(name, []).append(resident_mib(process))
            await trio.sleep(SAMPLE_S)


def memory_of(name: str, samples: Sequence[float]) -> Memory:
    warm = list(samples[int(WARM_UP_S / SAMPLE_S) :]) or list(samples)
    third = max(1, len(warm) // 3)
    return Memory(name, statistics.median(warm[:third]), statistics.median(warm[-third:]), max(samples))


async def measure(chosen: argparse.Namespace, console: Console) -> Figures:
    path = demo_model_path()
    api = Tally()
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "peerd.sock"
        async with open_peer_processes(threads=1) as processes:
            bootstrap = await processes.start()
            join = ["--bootstrap", str(bootstrap.address)]
            found = {}
            for span in even_spans(BLOCKS, SERVERS):
                serving = ["--serve-blocks", str(span), "--model", str(path), *join]
                found[f"server of {span}"] = await processes.start(*serving)
            client_options = ["--client", "--audit", "off", "--model", f"smol={path}", "--socket", str(socket), *join]
            found["daemon"] = await processes.start(*client_options)
            transport = httpx.AsyncHTTPTransport(uds=str(socket), limits=httpx.Limits(max_connections=chosen.chats))
            async with (
                open_peer(bootstrap=[bootstrap.address], audit=0.0) as peer,
                peer.model(path) as model,
                httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client,
                trio.open_nursery() as nursery,
            ):

                async def through_library(tally: Tally, text: str) -> None:
                    await one_through_library(model, tally, text, chosen.tokens)

                async def through_api(tally: Tally, text: str) -> None:
                    await one_through_api(client, tally, text, chosen.tokens)

                console.log("warming up")
                await chat_for(WARM_UP_S / 3, chosen.chats, Tally(), through_library)
                await chat_for(WARM_UP_S / 3, chosen.chats, Tally(), through_api)
                half_s = chosen.seconds / 2
                console.log(f"{chosen.chats} chats through the library")
                before = await chat_for(half_s, chosen.chats, Tally(), through_library)
                console.log(f"{chosen.chats} chats through the API")
                scope = await nursery.start(watch_memory, found, samples)
                api_rate = await chat_for(chosen.seconds, chosen.chats, api, through_api)
                scope.cancel()
                console.log(f"{chosen.chats} chats through the library")
                after = await chat_for(half_s, chosen.chats, Tally(), through_library)
    memory = tuple(memory_of(name, values) for name, values in samples.items())
    return Figures(chosen.chats, chosen.seconds, asdict(api), api_rate, (before, after), memory)


def show(figures: Figures, console: Console) -> None:
    api = figures.api
    console.print(f"{figures.chats} chats for {figures.seconds:g} s")
    console.print(f"answers {api['answers']}, tokens {api['tokens']}, 429s {api['refused']}")
    console.print(f"errors {sum(api['errors'].values())}")
    for words, count in api["errors"].items():
        console.print(f"  {count} x {words}")
    before, after = figures.library_rates
    console.print(
        f"tokens/s: API {figures.api_rate:.1f}, library {before:.1f} before and {after:.1f} after:"
        f" share {figures.share:.3f}"
    )
    for each in figures.memory:
        console.print(
            f"memory of the {each.name}: {each.first:.0f} -> {each.last:.0f} MiB ({each.growth:+.1%}),"
            f" most {each.most:.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120.0, help="through the API; half of it twice in the library")
    parser.add_argument("--tokens", type=int, default=48, help="the most that an answer has")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120, highlight=False)
    figures = trio.run(measure, chosen, console)
    show(figures, console)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(asdict(figures), indent=1) + "\n")
    if figures.api["errors"]:
        sys.exit("some chats got neither an answer nor a 429")


if __name__ == "__main__":
    main()
