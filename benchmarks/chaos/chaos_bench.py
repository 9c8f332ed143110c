"""`make chaos`: kills and stops servers of a swarm while eight sessions generate without pause, and checks all answers.

The swarm is six real server processes of the demonstration's model on loopback: three spans with two servers each.
Every ten seconds the benchmark chooses a server whose twin runs. It kills the server and starts it again later, or (in
turn) stops it and lets it continue later. Afterwards it compares every answer, greedy or sampled, with local
Transformers, token by token.

The report shows stalls. When a peer is killed or stopped, take each session that had the peer in its chain, and the
longer of two gaps between tokens: the one in which it happened, and the next. The stall is what this gap took beyond
the 95th percentile of the same sessions' gaps in a calm phase before. The exit code is 1 after a wrong token, an error
while every block had a server, a server that ended by itself, or a block without a server for more than 5 % of the
time.

All processes share this machine's cores, also those that are just starting, so compare figures within a run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import trio
from rich.console import Console

from benchmarks.chaos.answers import Asker, Reference
from benchmarks.chaos.report import Disturbance, Kind, Run, Struck, as_json, show
from benchmarks.chaos.swarm import ChaosSwarm, Member, open_chaos_swarm
from benchmarks.quality import TEXT
from peerd.cli.demo import even_spans
from peerd.cli.processes import ProcessEnded
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.peer import open_peer

# How long a session waits for a server of a block before it reports that there is none.
PATIENCE_S = 5.0
# The first answers also open connections and fill caches, so later ones are not compared with them.
WARM_UP_S = 3.0
# How long the last answers may take after the last disturbance.
FINISH_S = 120.0
# The pause between two looks at the sessions' chains.
LOOK_S = 0.1


@dataclass(frozen=True)
class Plan:
    """How often, how long and how hard to disturb the swarm. Values are drawn at random from the ranges."""

    seconds: float = 300.0
    every_s: float = 10.0
    calm_s: float = 30.0
    # How long a supervisor waits before it restarts a server.
    restart_after_s: tuple[float, float] = (1.0, 6.0)
    # The range reaches below and above the time in which a client notices a stopped server.
    stopped_s: tuple[float, float] = (4.0, 20.0)
    spans: int = 3
    twins: int = 2
    sessions: int = 8
    # The most tokens an answer may have.
    max_tokens: int | None = None
    seed: int = 1


class Chaos:
    """Runs the sessions, and disturbs the servers that they use."""

    def __init__(self, plan: Plan, swarm: ChaosSwarm, askers: Sequence[Asker], console: Console) -> None:
        self.run = Run()
        self._plan = plan
        self._swarm = swarm
        self._askers = askers
        self._console = console
        self._random = Random(plan.seed)

    async def ask(self) -> None:
        """Let all sessions ask without pause, first in a calm phase, then with disturbances. Returns after the last
        answers.
        """
        run, plan, stop = self.run, self._plan, trio.Event()
        async with trio.open_nursery() as disturbing:
            async with trio.open_nursery() as asking:
                for asker in self._askers:
                    asking.start_soon(asker.ask_until, stop, plan.max_tokens)
                await trio.sleep(WARM_UP_S)
                self._console.log(f"{plan.calm_s:g} s of calm, {len(self._askers)} sessions")
                run.calm_at = trio.current_time()
                await trio.sleep(plan.calm_s)
                self._console.log(f"{plan.seconds:g} s of chaos")
                run.chaos_at = trio.current_time()
                with trio.move_on_after(plan.seconds):
                    await self._disturb(disturbing)
                run.coverage = self._swarm.coverage(run.chaos_at, trio.current_time())
                stop.set()
                asking.cancel_scope.deadline = trio.current_time() + FINISH_S
            if asking.cancel_scope.cancelled_caught:
                run.errors.append(f"an answer was not finished {FINISH_S:g} s after the last disturbance")
            disturbing.cancel_scope.cancel()
        run.answers = [answer for asker in self._askers for answer in asker.answers]
        self._note_errors()

    def _note_errors(self) -> None:
        for answer in self.run.answers:
            if answer.error is not None and answer.ended is not None:
                covered = self._swarm.covered(answer.ended - PATIENCE_S, answer.ended)
                why = f"{type(answer.error).__name__} after {answer.ended - self.run.chaos_at:.1f} s: {answer.error}"
                (self.run.errors if covered else self.run.excused).append(why)
        self.run.ended_by_themselves = list(self._swarm.ended_by_themselves)

    async def _disturb(self, nursery: trio.Nursery) -> None:
        began = trio.current_time()
        kinds: itertools.cycle[Kind] = itertools.cycle(("kill", "stop"))
        for number in itertools.count(1):
            await trio.sleep_until(began + number * self._plan.every_s)
            candidates = self._swarm.expendable()
            if not candidates:
                self.run.skipped += 1
                continue
            member = self._random.choice(candidates)
            disturbance = self._disturbance(next(kinds), member, trio.current_time() - began)
            self.run.disturbances.append(disturbance)
            self._console.log(f"{disturbance.kind} {member.name} {member.span}: {len(disturbance.struck)} sessions")
            if disturbance.kind == "kill":
                self._swarm.kill(member)
                nursery.start_soon(self._start_again, member, disturbance)
            else:
                self._swarm.stop(member)
                nursery.start_soon(self._go_on, member, disturbance)

    def _disturbance(self, kind: Kind, member: Member, at_s: float) -> Disturbance:
        answers = [asker.now for asker in self._askers]
        struck = [
            Struck(answer, len(answer.token_ids), answer.held, answer.total)
            for answer in answers
            if answer is not None and member.peer_id in answer.peers
        ]
        return Disturbance(kind, member.name, member.span, at_s, struck)

    async def _start_again(self, member: Member, disturbance: Disturbance) -> None:
        await trio.sleep(self._random.uniform(*self._plan.restart_after_s))
        began = trio.current_time()
        try:
            await self._swarm.start_again(member)
        except ProcessEnded as error:
            self._swarm.ended_by_themselves.append(f"{member.name} did not start again: {error}")
            return
        disturbance.served_after_s = trio.current_time() - began
        await self._chained(member)
        disturbance.chained_after_s = trio.current_time() - began

    async def _go_on(self, member: Member, disturbance: Disturbance) -> None:
        disturbance.stopped_s = self._random.uniform(*self._plan.stopped_s)
        await trio.sleep(disturbance.stopped_s)
        self._swarm.go_on(member)

    async def _chained(self, member: Member) -> None:
        """Wait until one of the sessions has the peer in its chain."""
        while not any(asker.now is not None and member.peer_id in asker.now.peers for asker in self._askers):
            await trio.sleep(LOOK_S)


async def measure(plan: Plan, path: Path, console: Console) -> Run:
    """Start a swarm of the model at `path`, disturb it, stop it, and compare its answers with the reference."""
    with open_checkpoint(path) as checkpoint:
        spans = even_spans(checkpoint.block_count, plan.spans)
    console.log(f"starting {plan.spans * plan.twins} servers of {path.name}")
    async with (
        open_chaos_swarm(path, spans, plan.twins) as swarm,
        open_peer(bootstrap=[swarm.bootstrap.address]) as peer,
        peer.model(path) as model,
    ):
        text = model.encode(TEXT.read_text())
        chaos = Chaos(plan, swarm, [Asker(model, text, n, plan.seed) for n in range(plan.sessions)], console)
        await chaos.ask()
    run = chaos.run
    run.left_over = swarm.left_over()
    console.log(f"comparing {len(run.answers)} answers with local Transformers")
    run.verdict = await trio.to_thread.run_sync(lambda: Reference(path).judge(run.answers))
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="of chaos; calm, start and comparing take 2 more")
    parser.add_argument("--calm-s", type=float, default=Plan.calm_s, help="seconds of calm before")
    parser.add_argument("--every-s", type=float, default=Plan.every_s, help="seconds from one disturbance to the next")
    parser.add_argument("--sessions", type=int, default=Plan.sessions)
    parser.add_argument("--seed", type=int, default=Plan.seed, help="chooses victims, prompts and samples")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there too")
    chosen = parser.parse_args()
    plan = Plan(
        seconds=60 * chosen.minutes,
        calm_s=chosen.calm_s,
        every_s=chosen.every_s,
        sessions=chosen.sessions,
        seed=chosen.seed,
    )
    torch.set_num_threads(1)
    console = Console(width=120, stderr=True)
    run = None
    with suppress(KeyboardInterrupt):
        run = trio.run(measure, plan, demo_model_path(), console)
    if run is None:
        # All processes have been stopped by the cancellation.
        sys.exit(130)
    text = json.dumps(as_json(run), indent=2)
    if chosen.output is not None:
        chosen.output.write_text(text + "\n")
    if chosen.json:
        print(text)
    else:
        show(run, Console(width=120))
    sys.exit(1 if run.failures else 0)


if __name__ == "__main__":
    main()
