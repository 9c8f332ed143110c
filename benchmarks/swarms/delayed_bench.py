"""`make bench-delayed`: measures decoding over slow links, once round the chain and, for comparison, hub and spoke.

Real processes run on loopback: a client and one, two or three servers, which hold the demonstration's model between
them. A delaying proxy in front of each server makes a round trip between any two of them take 10 or 100 ms. In a chain
every server pushes to the next, so a token costs one way from the client to the first server, one way to each next
server, and one way back. With hub and spoke, as in Petals, the client carries hidden states to each server and back;
here it does so with one session for each server.

The expected time of a token is its time without delay in the same run, plus the sum of the one-way delays as the
proxies measured them. The delays take turns, so that a slow moment of the machine affects all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import trio
from rich.console import Console
from rich.table import Table

from benchmarks.quality import TEXT
from benchmarks.swarms.delayed_link import Passed
from benchmarks.swarms.delayed_swarm import DelayedSwarm, open_delayed_swarm
from benchmarks.swarms.swarm_bench import Local, prompts_of
from peerd.cli.demo import even_spans
from peerd.cli.processes import open_peer_processes
from peerd.client.model import SwarmModel
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.peer import open_peer
from peerd.protocol.span import Span

SERVERS = (1, 2, 3)
RTTS_MS = (0.0, 10.0, 100.0)
PROMPT_TOKENS = 32
# The first tokens of a turn, after a change of delays, are not counted.
SETTLING_TOKENS = 2
TOLERANCE = 0.1
# Steps a second that Petals reached on a similar machine, where local Transformers made 14, by servers and round trip.
PETALS = {(1, 10.0): 10.2, (2, 10.0): 8.8, (1, 100.0): 5.1, (2, 100.0): 3.3}

TakeToken = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Turn:
    """Several tokens in a row at one delay: the time of one token, the one-way delays that it crossed, and the bytes on
    these links.
    """

    token_s: float
    links_s: tuple[float, ...]
    link_bytes: float


@dataclass(frozen=True)
class Figure:
    """The medians of the turns of one way of decoding at one delay. `links_s`: the one-way delays of a token, link by
    link.

    `ratio` compares the time of a token with its expected time, turn by turn.
    """

    way: str
    servers: int
    rtt_ms: float
    token_s: float
    links_s: tuple[float, ...]
    link_bytes: float
    expected_s: float
    ratio: float

    @classmethod
    def of(cls, way: str, servers: int, rtt_ms: float, turns: Sequence[Turn], still: Sequence[Turn]) -> Figure:
        """Summarize turns. `still` are the same turns without delay."""
        expected_s = [
            other.token_s - sum(other.links_s) + sum(turn.links_s) for turn, other in zip(turns, still, strict=True)
        ]
        return cls(
            way,
            servers,
            rtt_ms,
            statistics.median(turn.token_s for turn in turns),
            tuple(statistics.median(link) for link in zip(*(turn.links_s for turn in turns), strict=True)),
            # Now and then announcements and measurements pass there too, so the turn with the fewest bytes is right.
            min(turn.link_bytes for turn in turns),
            statistics.median(expected_s),
            statistics.median(turn.token_s / expected for turn, expected in zip(turns, expected_s, strict=True)),
        )


class Chained:
    """Decodes with one session, whose servers push to each other."""

    name = "chain"

    def __init__(self, model: SwarmModel, spans: Sequence[Span], stack: AsyncExitStack, length: int) -> None:
        self._model = model
        self._parts = self._divided(spans)
        self._stack = stack
        self._length = length
        self._position = 0

    @staticmethod
    def _divided(spans: Sequence[Span]) -> list[Span]:
        return [Span(spans[0].start, spans[-1].end)]

    async def begin(self, prompt: list[int]) -> None:
        """Open the session or sessions, and compute the prompt."""
        self._sessions = [
            await self._stack.enter_async_context(self._model.session(max_length=self._length, blocks=part))
            for part in self._parts
        ]
        await self._step(prompt)

    async def take(self) -> None:
        """Decode one more token."""
        await self._step([self._token])

    async def _step(self, ids: list[int]) -> None:
        hidden = self._model.embed(ids, self._position)
        for session in self._sessions:
            hidden = await session.step(hidden, want="last" if session is self._sessions[-1] else "all")
        self._position += len(ids)
        self._token = int((await self._model.logits(hidden))[-1].argmax())

    def links(self, passed: Sequence[tuple[Passed, Passed]]) -> list[Passed]:
        """Return the lines that a token crosses, in their order."""
        first, last = passed[0][0], passed[-1][1]
        # A link between two servers crosses the proxy of the server that was dialled. Either proxy delays equally.
        between = [together(one[1], two[0]) for one, two in pairwise(passed)]
        return [first, *between, last]


class HubAndSpoke(Chained):
    """Decodes with one session for each server; the client carries hidden states from each server to the next."""

    name = "hub and spoke"

    @staticmethod
    def _divided(spans: Sequence[Span]) -> list[Span]:
        return list(spans)

    def links(self, passed: Sequence[tuple[Passed, Passed]]) -> list[Passed]:
        return [line for both in passed for line in both]


async def measure(
    path: Path, blocks: int, turns: int, tokens: int, console: Console, servers: Sequence[int] = SERVERS
) -> list[Figure]:
    """Measure one model in all ways, with each number of servers and each delay."""
    figures: list[Figure] = []
    async with open_peer_processes(threads=1) as processes:
        for count in servers:
            async with (
                open_delayed_swarm(processes, path, even_spans(blocks, count)) as swarm,
                open_peer(bootstrap=[swarm.bootstrap.address]) as peer,
                peer.model(path) as model,
            ):
                for way in (Chained, HubAndSpoke) if count > 1 else (Chained,):
                    console.log(f"{way.name}, {count} server{'s' if count > 1 else ''}")
                    figures += await measure_way(way, model, swarm, turns, tokens)
            for server in (swarm.bootstrap, *swarm.servers):
                server.process.kill()
    return figures


def together(*lines: Passed) -> Passed:
    """Add up what passed several lines."""
    return Passed(*(sum(values) for values in zip(*(astuple(line) for line in lines), strict=True)))


async def measure_way(
    way: type[Chained],
    model: SwarmModel,
    swarm: DelayedSwarm,
    turns: int,
    tokens: int,
    rtts_ms: Sequence[float] = RTTS_MS,
) -> list[Figure]:
    """Measure one way of decoding at each delay. The first delay must be 0."""
    length = PROMPT_TOKENS + (turns + 1) * len(rtts_ms) * (tokens + SETTLING_TOKENS)
    seen: dict[float, list[Turn]] = defaultdict(list)
    async with AsyncExitStack() as stack:
        decoder = way(model, swarm.spans, stack, length)
        await decoder.begin(model.encode(TEXT.read_text())[:PROMPT_TOKENS])
        for _ in range(turns + 1):
            for rtt_ms in rtts_ms:
                seen[rtt_ms].append(await _turn(decoder, swarm, rtt_ms, tokens))
        await swarm.proxies.set_rtt(0)
    # The first turn is warm-up.
    still = seen[0.0][1:]
    return [Figure.of(way.name, len(swarm.servers), rtt_ms, seen[rtt_ms][1:], still) for rtt_ms in rtts_ms]


async def _turn(decoder: Chained, swarm: DelayedSwarm, rtt_ms: float, tokens: int) -> Turn:
    await swarm.proxies.set_rtt(rtt_ms)
    for _ in range(SETTLING_TOKENS):
        await decoder.take()
    await swarm.proxies.passed()
    token_s = statistics.median([await _timed(decoder.take) for _ in range(tokens)])
    links = decoder.links(await swarm.proxies.passed())
    return Turn(token_s, tuple(link.mean_s for link in links), sum(link.bytes for link in links) / tokens)


async def _timed(take: TakeToken) -> float:
    began = trio.current_time()
    await take()
    return trio.current_time() - began


def show(figures: Sequence[Figure], local_s: float, console: Console) -> None:
    """Print a table."""
    table = Table(
        "servers", "round trip", "way", "one-way delays, ms", "should take", "takes", "of that", "steps/s", "Petals",
        title="SmolLM2-135M-Instruct, fp32, one thread a process; time a token, medians",
    )  # fmt: skip
    for figure in figures:
        petals = PETALS.get((figure.servers, figure.rtt_ms))
        table.add_row(
            str(figure.servers),
            f"{figure.rtt_ms:g} ms",
            figure.way,
            " + ".join(f"{1000 * link_s:.1f}" for link_s in figure.links_s),
            f"{1000 * figure.expected_s:.1f} ms",
            f"{1000 * figure.token_s:.1f} ms",
            f"{figure.ratio:.3f}",
            f"{1 / figure.token_s:.1f}",
            f"{petals:g}" if petals and figure.way == Chained.name else "",
        )
    console.print(table)
    console.print(f"local Transformers: {1 / local_s:.1f} steps/s here, 14 where Petals was measured")


def failures(figures: Sequence[Figure]) -> list[str]:
    """Return a message for each chain whose tokens took too long. Hub and spoke is only there for comparison."""
    return [
        f"{figure.way} of {figure.servers} at {figure.rtt_ms:g} ms took {figure.ratio:.2f} of what it should"
        for figure in figures
        if figure.way == Chained.name and not abs(figure.ratio - 1) <= TOLERANCE
    ]


def as_json(figures: Sequence[Figure], local_s: float) -> dict[str, Any]:
    """Return all figures; times are in seconds for a token."""
    rows = [
        {
            "way": figure.way,
            "servers": figure.servers,
            "rtt_ms": figure.rtt_ms,
            "token_s": round(figure.token_s, 5),
            "links_s": [round(link_s, 5) for link_s in figure.links_s],
            "link_bytes": round(figure.link_bytes),
            "expected_s": round(figure.expected_s, 5),
            "ratio": round(figure.ratio, 4),
            "petals_steps_per_s": PETALS.get((figure.servers, figure.rtt_ms)) if figure.way == Chained.name else None,
        }
        for figure in figures
    ]
    return {"local_token_s": round(local_s, 5), "figures": rows, "failures": failures(figures)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="of each delay")
    parser.add_argument("--tokens", type=int, default=12, help="counted in each turn")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there too")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120, stderr=True)
    path = demo_model_path()
    local = Local(path)
    blocks = local.model.config.num_hidden_layers
    figures: list[Figure] = []
    with suppress(KeyboardInterrupt):
        figures = trio.run(measure, path, blocks, chosen.turns, chosen.tokens, console)
    if not figures:
        # All processes have been stopped by the cancellation.
        sys.exit(130)
    local_s = statistics.median(local.token_times(prompts_of(1, PROMPT_TOKENS)[0], 24)[1] for _ in range(3))
    found = json.dumps(as_json(figures, local_s), indent=2)
    if chosen.output is not None:
        chosen.output.write_text(found + "\n")
    if chosen.json:
        print(found)
    else:
        show(figures, local_s, Console(width=120))
        for failure in failures(figures):
            print(f"FAILED: {failure}")
    sys.exit(1 if failures(figures) else 0)


if __name__ == "__main__":
    main()
