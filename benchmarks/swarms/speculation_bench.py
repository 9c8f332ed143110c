"""`make bench-speculation`: answers with and without guessed tokens over slow links, and the same tokens each time.

Real processes run on loopback: a client and three servers, which hold the demonstration's model between them, with a
delaying proxy before each (as `make bench-delayed`). Texts: a story (nothing repeats), a program, and one that copies
its prompt. Guesses come from the text itself; and, to see what the mechanism loses, from somebody who knows the answer
and errs on purpose, beside the bound of Leviathan et al. (arXiv 2211.17192) with the step times measured in that run.

Plain and guessed answers take turns. Figures are medians of the ratios of two neighbours. The least ratio of all cases
shows whether guessing ever loses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import trio
from rich.console import Console
from rich.table import Table

from benchmarks.quality import TEXT
from benchmarks.swarms.delayed_swarm import open_delayed_swarm
from peerd.cli.demo import even_spans
from peerd.cli.processes import open_peer_processes
from peerd.client.generation import Generation
from peerd.client.model import SwarmModel
from peerd.client.speculation.drafts import Draft
from peerd.client.speculation.speculation import MOST_DRAFTED, Speculation
from peerd.client.speculation.step_times import StepTimes
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.peer import open_peer

SERVERS = 3
BLOCKS = 30
RTTS_MS = (10.0, 25.0, 100.0)
SESSIONS = (1, 4, 16)
SHARES = (0.5, 0.7, 0.9)
GOAL = 0.98


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
    """One case: tokens a second of all its sessions together, plain and with guesses, and the median of the ratios.

    bound: for guesses of known quality, the gain of the best fixed number of guesses by the formula.
    """

    case: str
    rtt_ms: float
    sessions: int
    plain: float
    guessed: float
    ratio: float
    drafted: int
    accepted: int
    bound: float | None = None


class Foresight:
    """Guesses from a known answer, each right with a set probability."""

    def __init__(self, answer: Sequence[int], prompt: int, right: float) -> None:
        self._answer = answer
        self._prompt = prompt
        self._right = right
        self._random = random.Random(3)

    def propose(self, text: Sequence[int], count: int) -> Draft:
        ahead = self._answer[len(text) - self._prompt :][:count]
        # A wrong guess is a token that the answer does not have there.
        return Draft(tuple(token if self._random.random() < self._right else token ^ 1 for token in ahead))


def bound(share: float, times: StepTimes) -> float:
    """The expected gain of the best fixed number of guesses, each right with probability `share`."""
    return max(sum(share**n for n in range(count + 1)) / times.ratio(count) for count in range(MOST_DRAFTED + 1))


async def together(model: SwarmModel, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[Generation]]:
    """Tokens a second of all answers together, from the moment when all have their first token."""
    began: list[float] = []
    ready = trio.Event()

    async def one(generation: Generation) -> None:
        async for _ in generation:
            if len(generation.token_ids) == 1:
                began.append(trio.current_time())
                if len(began) == len(prompts):
                    ready.set()
                await ready.wait()

    answers = [model.generate(prompt, temperature=0.0, max_new_tokens=tokens, eos_token_ids=()) for prompt in prompts]
    async with trio.open_nursery() as nursery:
        for answer in answers:
            nursery.start_soon(one, answer)
    return len(prompts) * (tokens - 1) / (trio.current_time() - max(began)), answers


async def compare(
    model: SwarmModel, prompts: Sequence[Sequence[int]], tokens: int, rounds: int, speculation: Speculation
) -> tuple[list[float], list[float], list[Generation]]:
    """Plain and guessed in turn. The first pair is warm-up: it measures what steps cost."""
    plain, guessed = [], []
    for _ in range(rounds + 1):
        model.speculation = None
        rate, expected = await together(model, prompts, tokens)
        plain.append(rate)
        model.speculation = speculation
        rate, answers = await together(model, prompts, tokens)
        guessed.append(rate)
        for answer, other in zip(answers, expected, strict=True):
            assert answer.token_ids == other.token_ids, "guessing changed a token"
    return plain[1:], guessed[1:], answers


def figure(case: str, rtt_ms: float, found: tuple[list[float], list[float], list[Generation]]) -> Figure:
    plain, guessed, answers = found
    return Figure(
        case,
        rtt_ms,
        len(answers),
        statistics.median(plain),
        statistics.median(guessed),
        statistics.median(two / one for one, two in zip(plain, guessed, strict=True)),
        sum(answer.drafted for answer in answers),
        sum(answer.accepted for answer in answers),
    )


async def measure(chosen: argparse.Namespace, console: Console) -> list[Figure]:
    figures: list[Figure] = []
    path = demo_model_path()
    async with (
        open_peer_processes(threads=1) as processes,
        open_delayed_swarm(processes, path, even_spans(BLOCKS, SERVERS)) as swarm,
        open_peer(bootstrap=[swarm.bootstrap.address]) as peer,
        peer.model(path) as model,
    ):
        prompts = {case: model.encode(text, chat=True) for case, text in texts().items()}
        for rtt_ms, (case, prompt), sessions in itertools.product(chosen.rtts, prompts.items(), chosen.sessions):
            await swarm.proxies.set_rtt(rtt_ms)
            # Sessions that differ from their first token on.
            each = [[*model.encode(f"{number}. "), *prompt] for number in range(sessions)]
            tokens = max(24, chosen.tokens // sessions)
            found = figure(case, rtt_ms, await compare(model, each, tokens, chosen.rounds, Speculation()))
            console.log(found)
            figures.append(found)
        for rtt_ms, share in itertools.product(chosen.rtts if chosen.oracle else (), SHARES):
            await swarm.proxies.set_rtt(rtt_ms)
            prompt = prompts["story"]
            model.speculation = None
            _, [answer] = await together(model, [prompt], chosen.tokens)
            known = Speculation(partial(Foresight, answer.token_ids, len(prompt), share))
            found = figure(
                f"known, {share:g}", rtt_ms, await compare(model, [prompt], chosen.tokens, chosen.rounds, known)
            )
            figures.append(Figure(**{**asdict(found), "bound": bound(share, known.times)}))
            console.log(figures[-1])
    return figures


def show(figures: Sequence[Figure], console: Console) -> None:
    table = Table(
        "text", "round trip", "sessions", "plain, tokens/s", "guessed", "ratio", "bound", "right / sent",
        title=f"SmolLM2-135M-Instruct, fp32, {SERVERS} servers, one thread a process",
    )  # fmt: skip
    for found in figures:
        table.add_row(
            found.case,
            f"{found.rtt_ms:g} ms",
            str(found.sessions),
            f"{found.plain:.2f}",
            f"{found.guessed:.2f}",
            f"{found.ratio:.2f}",
            f"{found.bound:.2f}" if found.bound else "",
            f"{found.accepted} / {found.drafted}",
        )
    console.print(table)
    console.print(f"least ratio: {min(found.ratio for found in figures):.2f}, goal {GOAL}")


def numbers(kind: type, text: str) -> list[float]:
    return [kind(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtts", type=lambda text: numbers(float, text), default=RTTS_MS, metavar="MS,MS")
    parser.add_argument("--sessions", type=lambda text: numbers(int, text), default=SESSIONS, metavar="N,N")
    parser.add_argument("--tokens", type=int, default=160, help="of one answer; fewer with many sessions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-oracle", dest="oracle", action="store_false", help="leave out guesses of known quality")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON there too")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    figures: list[Figure] = []
    with suppress(KeyboardInterrupt):
        figures = trio.run(measure, chosen, Console(width=140, stderr=True))
    if not figures:
        sys.exit(130)
    if chosen.output is not None:
        chosen.output.write_text(json.dumps([asdict(found) for found in figures], indent=2) + "\n")
    show(figures, Console(width=120))


if __name__ == "__main__":
    main()
