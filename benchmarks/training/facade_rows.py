"""Measures the time that the Transformers facade adds to each token, and the bytes of a token on the wire."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trio
from rich.console import Console
from rich.table import Table

import peerd
from benchmarks.training.counting import CountingTransport
from peerd.cli.demo import even_spans
from peerd.cli.processes import open_peer_processes

PROMPT_TOKENS, NEW_TOKENS = 16, 48
EMPTY_CALLS = 500
LIBRARY, FACADE = "async library", "facade"


class Pair:
    """One swarm's model, through the async library and as a Transformers model, each over a peer of its own."""

    def __init__(self, library: peerd.SwarmModel, facade: Any, carried: CountingTransport) -> None:
        self._library, self._facade = library, facade
        # No answer ends early.
        facade.generation_config.eos_token_id = None
        self._carried = carried
        self._prompt = list(range(5, 5 + PROMPT_TOKENS))

    async def run(self, which: str) -> tuple[float, float]:
        """Return the seconds, and for the facade the bytes, of NEW_TOKENS greedy tokens after the prompt."""
        before, began = self._carried.carried, time.perf_counter()
        if which == LIBRARY:
            await self._by_library()
        else:
            await trio.to_thread.run_sync(self._by_facade)
        return time.perf_counter() - began, self._carried.carried - before

    async def _by_library(self) -> None:
        # Without guesses, which Transformers' greedy decoding has none of: from the second round on, the library would
        # guess the whole answer.
        options: dict[str, Any] = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "eos_token_ids": ()}
        async for _ in self._library.generate(self._prompt, speculate=False, **options):
            pass

    async def bridge_ms(self) -> float:
        """The milliseconds from one thread to the bridge's loop and back, with nothing to do there; a median."""

        def call_often() -> float:
            took = []
            for _ in range(EMPTY_CALLS):
                began = time.perf_counter()
                self._facade.swarm.bridge.call(trio.lowlevel.checkpoint)
                took.append(time.perf_counter() - began)
            return 1000 * statistics.median(took)

        return await trio.to_thread.run_sync(call_often)

    def _by_facade(self) -> None:
        ids = torch.tensor([self._prompt])
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        self._facade.generate(ids, attention_mask=torch.ones_like(ids), **options)


async def measure_facade(
    name: str, path: Path, blocks: int, servers: tuple[int, ...], rounds: int, console: Console
) -> None:
    """Measure both in turns, and print a table. Needs processes of its own."""
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    carried: dict[int, float] = {}
    async with open_peer_processes(threads=1) as processes, AsyncExitStack() as stack:
        pairs = {}
        for count in servers:
            bootstrap = await processes.start()
            join = ("--bootstrap", str(bootstrap.address), "--dtype", "float32", "--kv-tokens", "1024")
            for span in even_spans(blocks, count):
                await processes.start("--serve-blocks", str(span), "--model", str(path), *join)
            peer = await stack.enter_async_context(peerd.open_peer(bootstrap=[bootstrap.address]))
            library = await stack.enter_async_context(peer.model(path))
            counting = CountingTransport()
            open_it = partial(
                peerd.RemoteModelForCausalLM.from_pretrained, path, bootstrap=bootstrap.address, transport=counting
            )
            facade = await trio.to_thread.run_sync(open_it)
            stack.callback(facade.close)
            pairs[count] = Pair(library, facade, counting)
        for number in range(rounds + 1):
            console.log(f"{name}, facade, round {number} of {rounds}")
            for count, pair in pairs.items():
                for which in (LIBRARY, FACADE):
                    took_s, carried_bytes = await pair.run(which)
                    # The first round is warm-up.
                    if number:
                        times[count, which].append(1000 * took_s / NEW_TOKENS)
                        if which == FACADE:
                            carried[count] = carried_bytes / NEW_TOKENS
        bridges = {count: await pair.bridge_ms() for count, pair in pairs.items()}
    _show(name, times, carried, bridges, console)


def _show(
    name: str,
    times: dict[tuple[int, str], list[float]],
    carried: dict[int, float],
    bridges: dict[int, float],
    console: Console,
) -> None:
    table = Table("", *(f"{count} server{'s' if count > 1 else ''}" for count in carried))
    table.title = f"{name}, fp32, {NEW_TOKENS} greedy tokens behind {PROMPT_TOKENS}; medians"
    for which in (LIBRARY, FACADE):
        table.add_row(f"{which}, ms a token", *(f"{statistics.median(times[count, which]):.1f}" for count in carried))
    added = [
        statistics.median(one - two for one, two in zip(times[count, FACADE], times[count, LIBRARY], strict=True))
        for count in carried
    ]
    table.add_row("the facade adds, ms a token", *(f"{each:+.2f}" for each in added))
    table.add_row("of which the bridge, an empty call, ms", *(f"{bridges[count]:.3f}" for count in carried))
    table.add_row("client's wire bytes a token", *(f"{carried[count]:.0f}" for count in carried))
    console.print(table)
