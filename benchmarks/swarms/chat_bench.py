"""`make bench-chat`: time to the first token of each turn of a chat, with sessions that are kept and without.

Real processes run on loopback: a client and three servers, which hold the demonstration's model between them, with a
delaying proxy before each. Each user's turn brings some 360 tokens, so that the fifth turn's prompt has 2,000. Both
ways take turns, and must give the same tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import trio
from rich.console import Console
from rich.table import Table

from benchmarks.quality import TEXT
from benchmarks.swarms.delayed_swarm import open_delayed_swarm
from peerd.cli.demo import even_spans
from peerd.cli.processes import open_peer_processes
from peerd.client.model import SwarmModel
from peerd.client.session.kept_sessions import KeptSessions
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.peer import open_peer

SERVERS = 3
BLOCKS = 30
RTTS_MS = (0.0, 100.0)
TURN_TOKENS = 360
ANSWER_TOKENS = 24
KEPT_POSITIONS = 16_384


@dataclass(frozen=True)
class Figure:
    """One turn: the length of its prompt, and the medians of the seconds to its first token. `ratio` is that of
    neighbours.
    """

    rtt_ms: float
    turn: int
    prompt: int
    new_s: float
    kept_s: float
    ratio: float


async def chat(model: SwarmModel, turns: Sequence[Sequence[int]]) -> list[tuple[int, float, list[int]]]:
    """For each turn the length of its prompt, the seconds to its first token, and the tokens of the answer."""
    context: list[int] = []
    found = []
    for turn in turns:
        context += turn
        answer = model.generate(context, temperature=0.0, max_new_tokens=ANSWER_TOKENS, eos_token_ids=())
        async for _ in answer:
            pass
        assert answer.time_to_first_token_s is not None
        found.append((len(context), answer.time_to_first_token_s, answer.token_ids))
        context += answer.token_ids
    return found


async def measure(chosen: argparse.Namespace, console: Console) -> list[Figure]:
    """Both ways in turn, `--rounds` times after one that warms up."""
    figures = []
    path = demo_model_path()
    async with (
        open_peer_processes(threads=1) as processes,
        open_delayed_swarm(processes, path, even_spans(BLOCKS, SERVERS)) as swarm,
        open_peer(bootstrap=[swarm.bootstrap.address]) as peer,
        peer.model(path) as model,
        trio.open_nursery() as tasks,
    ):
        ids = model.encode(TEXT.read_text() * 4)
        for rtt_ms in chosen.rtts:
            await swarm.proxies.set_rtt(rtt_ms)
            pairs = []
            for number in range(chosen.rounds + 1):
                # Each round begins in another way, so that none takes up an earlier one's sessions.
                first = [ids[number], *ids[: TURN_TOKENS - 1]]
                rest = [ids[turn * TURN_TOKENS : (turn + 1) * TURN_TOKENS] for turn in range(1, chosen.turns)]
                model.kept = None
                new = await chat(model, [first, *rest])
                model.kept = KeptSessions(KEPT_POSITIONS, tasks)
                kept = await chat(model, [first, *rest])
                assert [turn[2] for turn in new] == [turn[2] for turn in kept], "a kept session changed a token"
                pairs.append((new, kept))
            for turn in range(chosen.turns):
                news, kepts = ([pair[way][turn][1] for pair in pairs[1:]] for way in (0, 1))
                figures.append(
                    Figure(
                        rtt_ms,
                        turn + 1,
                        pairs[0][0][turn][0],
                        statistics.median(news),
                        statistics.median(kepts),
                        statistics.median(one / two for one, two in zip(news, kepts, strict=True)),
                    )
                )
                console.log(figures[-1])
        tasks.cancel_scope.cancel()
    return figures


def show(figures: Sequence[Figure], console: Console) -> None:
    """The table."""
    table = Table("round trip", "turn", "prompt", "new session", "kept session", "ratio")
    for each in figures:
        table.add_row(
            f"{each.rtt_ms:g} ms",
            str(each.turn),
            str(each.prompt),
            f"{each.new_s:.2f} s",
            f"{each.kept_s:.2f} s",
            f"{each.ratio:.1f}",
        )
    console.print(table)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rtts", type=float, nargs="+", default=RTTS_MS, metavar="MS")
    parser.add_argument("--json", type=Path, metavar="FILE")
    chosen = parser.parse_args()
    console = Console(file=sys.stderr)
    figures = trio.run(measure, chosen, console)
    show(figures, Console())
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(each) for each in figures], indent=1) + "\n")


if __name__ == "__main__":
    main()
