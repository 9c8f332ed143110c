"""`make bench-speculation`: answers with and without guessed tokens over slow links, and the same tokens each time.

First in virtual time (`benchmarks/simulated/speculation_tables.py`): guesses of known quality beside the formula's
bound, recorded texts, and many sessions that share the servers. Then with real processes on loopback: a client and
three servers, which hold the demonstration's model between them, with a delaying proxy before each (as `make
bench-delayed`). Plain and guessed answers take turns until the mean of their ratios is known to a hundredth, or for
`--seconds` a case. With `--draft` a head or a small model guesses too.

With `--output` each case is written when it is done, and those that the file has already are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import trio
from rich.console import Console
from rich.table import Table

from benchmarks.quality import TEXT
from benchmarks.simulated.speculation_tables import Row, oracle_rows, text_rows
from benchmarks.swarms.delayed_swarm import DelayedSwarm, open_delayed_swarm
from peerd.cli.demo import even_spans
from peerd.cli.processes import open_peer_processes
from peerd.client.generation import Generation
from peerd.client.model import SwarmModel
from peerd.client.speculation.speculation import Speculation
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.peer import open_peer

SERVERS = 3
BLOCKS = 30
SIMULATED_RTTS_MS = (0.0, 10.0, 25.0, 100.0)
RTTS_MS = (10.0, 100.0)
SESSIONS = (1, 4, 16)
GOAL = 0.98
# The mean ratio is known well enough when its standard error is this small, and after this many pairs.
NOISE = 0.008
LEAST_PAIRS = 4


def texts() -> dict[str, str]:
    """A prompt for each kind of text."""
    paragraph = " ".join(TEXT.read_text().split()[:120])
    return {
        "story": "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
        "code": "Write a Python class for a bank account, with deposits, transfers, and a test for each method.",
        "copy": f"Repeat the following text word for word, and nothing else.\n\n{paragraph}",
    }


@dataclass(frozen=True)
class Figure:
    """One case on real processes: tokens a second, plain and with guesses, and the mean of the pairs' ratios with its
    standard error.
    """

    text: str
    rtt_ms: float
    plain: float
    guessed: float
    ratio: float
    error: float
    pairs: int
    drafted: int
    accepted: int


class Kept:
    """The rows that are done, in a file if there is one, so that a run that was ended goes on where it was."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.rows: dict[str, dict[str, object]] = {}
        if path is not None and path.exists():
            self.rows = json.loads(path.read_text())

    def add(self, row: Row | Figure) -> None:
        """Keep a row."""
        self.rows[key_of(row)] = asdict(row)
        if self._path is not None:
            self._path.write_text(json.dumps(self.rows, indent=1) + "\n")

    def of(self, kind: type[Row] | type[Figure]) -> list[dict[str, object]]:
        """The rows of one kind."""
        return [row for key, row in self.rows.items() if key.startswith(kind.__name__)]


def key_of(row: Row | Figure) -> str:
    """What a row is of."""
    sessions = row.sessions if isinstance(row, Row) else 1
    return f"{type(row).__name__} {row.text} {row.rtt_ms:g} {sessions}"


def simulate(kept: Kept, rtts: Sequence[float], sessions: Sequence[int], console: Console) -> None:
    """The tables in virtual time."""
    if kept.of(Row):
        return
    found = list[Row]()
    for row in itertools.chain(oracle_rows(rtts), text_rows(rtts, sessions)):
        console.log(f"simulated: {row.text}, {row.rtt_ms:g} ms, {row.sessions} sessions: {row.ratio:.3f}")
        found.append(row)
    for row in found:
        kept.add(row)


async def answer(model: SwarmModel, prompt: Sequence[int], tokens: int) -> Generation:
    """One greedy answer."""
    generation = model.generate(prompt, temperature=0.0, max_new_tokens=tokens, eos_token_ids=())
    async for _ in generation:
        pass
    return generation


async def pair(
    model: SwarmModel, prompt: Sequence[int], tokens: int, speculation: Speculation, *, plain_first: bool
) -> tuple[Generation, Generation]:
    """A plain answer and a guessed one, in this order or the other, so that a drift of the machine cancels out."""
    found = dict[bool, Generation]()
    for plain in (plain_first, not plain_first):
        model.speculation = None if plain else speculation
        found[plain] = await answer(model, prompt, tokens)
    assert found[True].token_ids == found[False].token_ids, "guessing changed a token"
    return found[True], found[False]


async def compare(
    model: SwarmModel, text: str, rtt_ms: float, tokens: int, seconds: float, speculation: Speculation
) -> Figure:
    """Plain and guessed in turn. The first pair is warm-up: it measures what steps cost."""
    prompt = model.encode(texts()[text], chat=True)
    await pair(model, prompt, tokens, speculation, plain_first=True)
    pairs, until = list[tuple[Generation, Generation]](), trio.current_time() + seconds
    ratios = list[float]()
    while len(pairs) < LEAST_PAIRS or (trio.current_time() < until and error_of(ratios) > NOISE):
        pairs.append(await pair(model, prompt, tokens, speculation, plain_first=len(pairs) % 2 == 0))
        ratios = [rate(guessed) / rate(plain) for plain, guessed in pairs]
    plain, guessed = (statistics.median(map(rate, side)) for side in zip(*pairs, strict=True))
    last = pairs[-1][1]
    mean = statistics.geometric_mean(ratios)
    return Figure(
        text, rtt_ms, plain, guessed, mean, error_of(ratios), len(pairs), last.drafted, last.accepted
    )  # fmt: skip


def rate(generation: Generation) -> float:
    """Tokens a second after the first one."""
    found = generation.tokens_per_second
    assert found is not None
    return found


def error_of(ratios: Sequence[float]) -> float:
    """The standard error of their mean, as a share of it."""
    if len(ratios) < 2:
        return math.inf
    return statistics.stdev(map(math.log, ratios)) / math.sqrt(len(ratios))


async def measure(kept: Kept, chosen: argparse.Namespace, console: Console) -> None:
    """The cases on real processes."""
    path = demo_model_path()
    async with AsyncExitStack() as stack:
        processes = await stack.enter_async_context(open_peer_processes(threads=1))
        swarm = await stack.enter_async_context(open_delayed_swarm(processes, path, even_spans(BLOCKS, SERVERS)))
        peer = await stack.enter_async_context(open_peer(bootstrap=[swarm.bootstrap.address]))
        model = await stack.enter_async_context(peer.model(path))
        await run_cases(kept, chosen, console, swarm, model, "")
        if chosen.draft is not None:
            await stack.enter_async_context(peer.drafting(model, chosen.draft))
            await run_cases(kept, chosen, console, swarm, model, " and a drafter")


async def run_cases(
    kept: Kept, chosen: argparse.Namespace, console: Console, swarm: DelayedSwarm, model: SwarmModel, by: str
) -> None:
    """Each text at each round trip, with the text's own guesses, or also a drafter's."""
    source = None if model.speculation is None else model.speculation.model
    for rtt_ms, text in cases(chosen.rtts, by):
        wanted = Figure(f"{text}{by}", rtt_ms, 0, 0, 0, 0, 0, 0, 0)
        if key_of(wanted) in kept.rows:
            continue
        await swarm.proxies.set_rtt(rtt_ms)
        found = await compare(model, text, rtt_ms, chosen.tokens, chosen.seconds, Speculation(model=source))
        kept.add(Figure(**{**asdict(found), "text": wanted.text}))
        console.log(found)
    model.speculation = Speculation(model=source)


def cases(rtts: Sequence[float], by: str) -> Iterator[tuple[float, str]]:
    """A drafter is for what does not repeat itself."""
    for rtt_ms, text in itertools.product(rtts, texts()):
        if not by or text != "copy":
            yield rtt_ms, text


def show(kept: Kept, console: Console) -> None:
    """Print the tables, and the least ratio of each."""
    rows = [Row(**row) for row in kept.of(Row)]  # type: ignore[arg-type]
    figures = [Figure(**row) for row in kept.of(Figure)]  # type: ignore[arg-type]
    head = ("text", "round trip", "sessions", "plain, tokens/s", "guessed", "ratio", "bound", "right / sent")
    table = Table(*head, title="simulated")
    for row in rows:
        shown = f"{row.bound:.2f} ({row.ratio / row.bound:.2f} of it)" if row.bound else ""
        table.add_row(
            row.text, f"{row.rtt_ms:g} ms", f"{row.sessions}", f"{row.plain:.2f}", f"{row.guessed:.2f}",
            f"{row.ratio:.3f}", shown, f"{row.accepted} / {row.drafted}",
        )  # fmt: skip
    console.print(table)
    head = ("text", "round trip", "", "plain, tokens/s", "guessed", "ratio", "pairs", "right / sent")
    table = Table(*head, title="real processes")
    for found in figures:
        table.add_row(
            found.text, f"{found.rtt_ms:g} ms", "", f"{found.plain:.2f}", f"{found.guessed:.2f}",
            f"{found.ratio:.3f} ± {found.error:.3f}", f"{found.pairs}", f"{found.accepted} / {found.drafted}",
        )  # fmt: skip
    console.print(table)
    for name, ratios in (("simulated", [row.ratio for row in rows]), ("real", [found.ratio for found in figures])):
        if ratios:
            console.print(f"least ratio, {name}: {min(ratios):.3f}, goal {GOAL}")


def numbers(kind: type, text: str) -> list[float]:
    """The numbers in a list with commas."""
    return [kind(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    floats = lambda text: numbers(float, text)  # noqa: E731
    parser.add_argument("--rtts", type=floats, default=RTTS_MS, metavar="MS,MS", help="of real links; empty for none")
    parser.add_argument("--simulated-rtts", type=floats, default=SIMULATED_RTTS_MS, metavar="MS,MS")
    parser.add_argument("--sessions", type=lambda text: numbers(int, text), default=SESSIONS, metavar="N,N")
    parser.add_argument("--tokens", type=int, default=80, help="of an answer on real links")
    parser.add_argument("--seconds", type=float, default=40.0, help="the most for a case on real links")
    parser.add_argument("--draft", metavar="HEAD", help="a head or a small model that guesses too")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON there, and go on from what it has")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    kept, console = Kept(chosen.output), Console(width=140, stderr=True)
    with suppress(KeyboardInterrupt):
        simulate(kept, chosen.simulated_rtts, chosen.sessions, console)
        if chosen.rtts:
            trio.run(measure, kept, chosen, console)
    show(kept, Console(width=130))
    if not kept.rows:
        sys.exit(130)


if __name__ == "__main__":
    main()
