"""Attacks a server: does it survive, does its memory stay, and does an honest client keep its speed?

`make bench-hostile` starts a real server of the demonstration's model on loopback, decodes on it without pause, and
after a while attacks it from another process. Half of the attacks come from strangers: garbage on TCP, half-finished
handshakes, garbage in websockets and in Noise, and connections that send hardly anything. The other half come from
peers that prove their key and then send mutated valid messages in every protocol, and floods.

Server, client and attackers share this machine's cores. An attack that fills a core slows every process on it, however
well the server resists; so `--rate` limits each half. And before the server is attacked, the same attacks go to a sink
in the attackers' own process, which reads and drops them: what the client loses then is the attackers' share of the
cores, and what it loses beyond that is the attack's cost to the server. The valid steps of an attack's conversation
are work that any client may request. Compare figures within a run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import trio
from rich.console import Console
from rich.table import Table

from benchmarks.swarms.hostile_attacks import Attackers
from benchmarks.swarms.hostile_sink import Sink
from peerd.cli.processes import PeerProcess, open_peer_processes
from peerd.client.model import SwarmModel
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.peer import open_peer
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.span import Span
from peerd.testing.hostile import Target

# The pool is filled once before the measurement, so that memory that the server reserved at its start is not growth.
KV_TOKENS = 2048
SESSION_LENGTH = 384
PROMPT_TOKENS = 32
QUIET_S = 15.0
# Sessions linger for 15 s after their connections break, unproven connections for 10 s.
SETTLE_S = 20.0


# The attackers' process.


def attack(arguments: argparse.Namespace) -> None:
    """Attack, then print how many attacks of each kind were made, and how many seconds of a core they took."""
    start, end = map(int, arguments.blocks.split(":"))
    seconds = 0.0

    async def run(attackers: Attackers) -> None:
        nonlocal seconds
        began = time.process_time()
        await attackers.run(arguments.seconds, arguments.rate)
        seconds = time.process_time() - began

    async def main() -> Attackers:
        address = Multiaddr.parse(arguments.attack)
        assert address.peer_id is not None
        target = Target(PeerId(address.peer_id), bytes.fromhex(arguments.digest), Span(start, end), arguments.width)
        async with trio.open_nursery() as nursery:
            where = address.with_peer(None)
            if arguments.sink:
                port = await nursery.start(Sink(Identity.generate()).run)
                where = replace(where, port=port)
            attackers = Attackers(where, target, Random(arguments.seed))
            await run(attackers)
            nursery.cancel_scope.cancel()
        return attackers

    attackers = trio.run(main)
    print(json.dumps({"sent": attackers.sent, "cpu_s": seconds}))


# The honest client's process.


@dataclass
class Decoder:
    """Decodes on one session without pause, and notes when each token came."""

    model: SwarmModel
    times: list[float] = field(default_factory=list)

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        async with self.model.session(max_length=SESSION_LENGTH, max_rollback=SESSION_LENGTH) as session:
            await session.step(self.model.embed(list(range(100, 100 + PROMPT_TOKENS))))
            task_status.started()
            token, position = 100, PROMPT_TOKENS
            while True:
                # Start over where the session is full: the next position is then a rollback.
                position = PROMPT_TOKENS if position == SESSION_LENGTH else position
                hidden = await session.step(self.model.embed([token], position), start=position)
                token = int((await self.model.logits(hidden))[-1].argmax())
                position += 1
                self.times.append(trio.current_time())

    def rate(self, since: float, until: float) -> float:
        """Tokens a second."""
        return sum(since <= at < until for at in self.times) / (until - since)


def rss_mib(pid: int) -> float:
    """The process's resident memory; 0 if it has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def cpu_s(pid: int) -> float:
    """The seconds of a core that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def fill_pool(model: SwarmModel) -> None:
    """Use all of the server's KV memory once."""
    length = KV_TOKENS
    async with model.session(max_length=length) as session:
        await session.step(model.embed([100] * length))


async def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    path = demo_model_path()
    with open_checkpoint(path) as checkpoint:
        span = Span(0, checkpoint.block_count)
    async with open_peer_processes(threads=1) as processes:
        server = await processes.start("--serve-blocks", str(span), "--model", str(path), "--kv-tokens", str(KV_TOKENS))
        async with open_peer(bootstrap=[server.address]) as peer, peer.model(path) as model:
            console.log("filling the server's KV memory")
            await fill_pool(model)
            decoder = Decoder(model)
            async with trio.open_nursery() as nursery:
                await nursery.start(decoder.run)
                figures = await phases(arguments, server, model, decoder, console)
                nursery.cancel_scope.cancel()
    return figures


@dataclass(frozen=True)
class Phase:
    """What was seen in one phase: the client's tokens a second, seconds of a core a second, and the server's memory
    at its end.
    """

    name: str
    rate: float
    server: float
    client: float
    attackers: float
    mib: float


@dataclass
class Measurement:
    """Measures phases of one run, one after the other."""

    arguments: argparse.Namespace
    server: PeerProcess
    model: SwarmModel
    decoder: Decoder
    phases: list[Phase] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)

    async def quiet(self, name: str, seconds: float = QUIET_S) -> None:
        before = self._used()
        began = trio.current_time()
        await trio.sleep(seconds)
        self._note(name, before, began, 0.0)

    async def attacked(self, name: str, *, sink: bool) -> None:
        before, began = self._used(), trio.current_time()
        said = await self._attack(sink)
        # In its first seconds the attackers' process only starts.
        self.sent = said["sent"]
        self._note(name, before, began, said["cpu_s"] / self.arguments.seconds, last_s=self.arguments.seconds)

    async def _attack(self, sink: bool) -> dict[str, Any]:
        given, facts = self.arguments, self.model.facts
        command = [sys.executable, "-m", "benchmarks.swarms.hostile_bench", "--attack", str(self.server.address)]
        command += ["--digest", facts.digest.hex()]
        command += ["--blocks", f"0:{facts.block_count}", "--width", str(facts.width)]
        command += ["--seconds", str(given.seconds), "--rate", str(given.rate), "--seed", str(given.seed)]
        ended = await trio.run_process([*command, *(["--sink"] if sink else [])], capture_stdout=True)
        said: dict[str, Any] = json.loads(ended.stdout)
        return said

    def _used(self) -> tuple[float, float]:
        return cpu_s(self.server.process.pid), time.process_time()

    def _note(
        self, name: str, before: tuple[float, float], began: float, attackers: float, last_s: float | None = None
    ) -> None:
        now, used = trio.current_time(), self._used()
        server, client = ((after - first) / (now - began) for after, first in zip(used, before, strict=True))
        rate = self.decoder.rate(now - last_s if last_s is not None else began, now)
        self.phases.append(Phase(name, rate, server, client, attackers, rss_mib(self.server.process.pid)))


async def phases(
    arguments: argparse.Namespace, server: PeerProcess, model: SwarmModel, decoder: Decoder, console: Console
) -> dict[str, Any]:
    """Measure a quiet phase, the attackers alone, an attack, and a quiet phase again."""
    run = Measurement(arguments, server, model, decoder)
    await trio.sleep(2)
    console.log("quiet")
    await run.quiet("before")
    console.log(f"{arguments.seconds:g} s of attacks on a sink")
    await run.attacked("sink attacked", sink=True)
    console.log(f"{arguments.seconds:g} s of attacks on the server")
    await run.attacked("server attacked", sink=False)
    console.log("quiet again")
    await run.quiet("after", SETTLE_S)
    alive = server.process.poll() is None
    if not alive:
        console.print(server.log.read_text(errors="replace")[-4000:], markup=False)
    return {"alive": alive, "phases": run.phases, "sent": run.sent}


def show(figures: dict[str, Any], arguments: argparse.Namespace, console: Console) -> None:
    found: list[Phase] = figures["phases"]
    before, alone, attacked, _ = found
    title = (
        f"{arguments.seconds:g} s of hostile peers: {arguments.rate:g} attacks a second from strangers, as many from"
        " known peers; SmolLM2-135M-Instruct, fp32, one thread a process, loopback"
    )
    table = Table("", *(phase.name for phase in found), title=title)
    table.add_row("honest client, tokens/s", *(f"{phase.rate:.1f}" for phase in found))
    table.add_row("of its speed before", *(f"{phase.rate / before.rate:.2f}" for phase in found))
    table.add_row("of its speed beside the sink", "", "1", f"{attacked.rate / alone.rate:.2f}", "")
    table.add_row("server's memory, MiB", *(f"{phase.mib:.0f}" for phase in found))
    table.add_row("cores used by the server", *(f"{phase.server:.2f}" for phase in found))
    table.add_row("cores used by the client", *(f"{phase.client:.2f}" for phase in found))
    table.add_row("cores used by the attackers", *(f"{phase.attackers:.2f}" for phase in found))
    for kind, count in figures["sent"].items():
        table.add_row(kind, "", "", str(count), "")
    table.add_row("attacks sent", "", "", str(sum(figures["sent"].values())), "")
    table.add_row("server alive", "yes", "yes", "", "yes" if figures["alive"] else "NO")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rate", type=float, default=5, help="attacks a second, of each half")
    parser.add_argument("--seed", type=int, default=1)
    for internal in ("--attack", "--digest", "--blocks"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--sink", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.attack:
        attack(arguments)
        return
    console = Console(width=120)
    figures = trio.run(measure, arguments, console)
    show(figures, arguments, console)
    if not figures["alive"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
