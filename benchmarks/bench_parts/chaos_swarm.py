"""The victims of `chaos`: server processes, twins of each other, that are killed, stopped, continued and started again.

Knows each process's state and since when, so that it can say how much of the time every block had an owner that ran;
knows no sessions. The difficulty is fairness: only who has a twin that runs may be disturbed, for what nobody
serves no client can use; and a process that ends without having been told to is a failure, not a disturbance.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import trio

from peerd.cli.processes import PeerProcess, PeerProcesses, open_peer_processes
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.span import Span
from peerd.trio_tools import open_tasks

State = Literal["starting", "serving", "stopped", "dead"]
# Room for all sessions of a run at once, on each twin.
KV_TOKENS = 8192


class Member:
    """One server of the swarm, through all its lives."""

    def __init__(self, name: str, span: Span, peer: PeerProcess) -> None:
        self.name = name
        self.span = span
        self.peer = peer
        self.state: State = "serving"
        # When the state became what, from the first time that it served.
        self.history: list[tuple[float, State]] = [(trio.current_time(), "serving")]

    def __repr__(self) -> str:
        return f"<Member {self.name} {self.span} {self.state}>"

    @property
    def peer_id(self) -> str:
        return self.peer.peer_id

    def be(self, state: State) -> None:
        self.state = state
        self.history.append((trio.current_time(), state))

    def serving_s(self, start: float, end: float) -> list[tuple[float, float]]:
        """The parts of a time in which it served."""
        ends = [*(at for at, _ in self.history[1:]), end]
        parts = [(max(at, start), min(until, end)) for (at, state), until in self._serving(ends)]
        return [(at, until) for at, until in parts if at < until]

    def _serving(self, ends: Sequence[float]) -> list[tuple[tuple[float, State], float]]:
        return [(entry, until) for entry, until in zip(self.history, ends, strict=True) if entry[1] == "serving"]


class ChaosSwarm:
    """A bootstrap peer, which nobody disturbs, and for each span as many servers as it has twins."""

    bootstrap: PeerProcess

    def __init__(self, processes: PeerProcesses, tasks: trio.Nursery) -> None:
        self.members: list[Member] = []
        # Servers that ended though nobody killed them.
        self.ended_by_themselves: list[str] = []
        self._processes = processes
        self._tasks = tasks

    async def start(self, model: Path, spans: Sequence[Span], twins: int) -> None:
        """Start all processes; returns when they serve. Raises ProcessEnded."""
        self.bootstrap = await self._processes.start()
        async with trio.open_nursery() as nursery:
            for twin in range(twins):
                for number, span in enumerate(spans):
                    name = f"{number + 1}{chr(ord('a') + twin)}"
                    nursery.start_soon(self._start_one, name, span, model, self.bootstrap.address)
        self.members.sort(key=lambda member: member.name)

    async def _start_one(self, name: str, span: Span, model: Path, bootstrap: Multiaddr) -> None:
        serve = ("--serve-blocks", str(span), "--model", str(model), "--bootstrap", str(bootstrap))
        # Twins that announce the same speed share the work.
        peer = await self._processes.start(*serve, "--kv-tokens", str(KV_TOKENS), "--throughput", "1000")
        member = Member(name, span, peer)
        self.members.append(member)
        self._tasks.start_soon(self._watch, member, peer)

    async def _watch(self, member: Member, peer: PeerProcess) -> None:
        await peer.process.wait()
        if member.peer is peer and member.state != "dead":
            member.be("dead")
            tail = "\n".join(peer.log.read_text(errors="replace").splitlines()[-5:])
            self.ended_by_themselves.append(f"{member.name} ended with exit code {peer.process.returncode}: {tail}")

    def expendable(self) -> list[Member]:
        """Who serves, and has a twin that serves too."""
        serving = [member for member in self.members if member.state == "serving"]
        return [one for one in serving if any(two is not one and two.span == one.span for two in serving)]

    def kill(self, member: Member) -> None:
        """Its process ends without a word."""
        member.be("dead")
        member.peer.process.send_signal(signal.SIGKILL)

    def stop(self, member: Member) -> None:
        """Its process does nothing any more, but its connections stay."""
        member.be("stopped")
        member.peer.process.send_signal(signal.SIGSTOP)

    def go_on(self, member: Member) -> None:
        """Its process goes on where it was stopped."""
        member.peer.process.send_signal(signal.SIGCONT)
        member.be("serving")

    async def start_again(self, member: Member) -> None:
        """Start a killed server, the same peer in the same place; returns when it serves. Raises ProcessEnded."""
        await member.peer.process.wait()
        member.be("starting")
        member.peer = await self._processes.start_again(member.peer)
        member.be("serving")
        self._tasks.start_soon(self._watch, member, member.peer)

    def coverage(self, start: float, end: float) -> dict[Span, float]:
        """The share of a time in which each span had an owner that served."""
        shares = {}
        for span in sorted({member.span for member in self.members}):
            parts = [part for member in self.members if member.span == span for part in member.serving_s(start, end)]
            shares[span] = _union_s(parts) / (end - start)
        return shares

    def covered(self, start: float, end: float) -> bool:
        """Whether every block had an owner that served, all the time."""
        return min(self.coverage(start, end).values()) > 1 - 1e-9

    def end(self) -> None:
        """Nothing that happens from now on is anybody's failure; who is stopped can be told to end."""
        for member in self.members:
            if member.state == "stopped":
                member.peer.process.send_signal(signal.SIGCONT)
            member.state = "dead"

    def left_over(self) -> list[int]:
        """Processes that still run."""
        peers = [member.peer for member in self.members] + [self.bootstrap]
        return [peer.process.pid for peer in peers if peer.process.poll() is None]


def _union_s(parts: list[tuple[float, float]]) -> float:
    total, reached = 0.0, float("-inf")
    for start, end in sorted(parts):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@asynccontextmanager
async def open_chaos_swarm(model: Path, spans: Sequence[Span], twins: int) -> AsyncIterator[ChaosSwarm]:
    """A swarm of processes with one compute thread each. None of them outlives the body."""
    async with open_peer_processes(threads=1) as processes, open_tasks() as tasks:
        swarm = ChaosSwarm(processes, tasks)
        try:
            await swarm.start(model, spans, twins)
            yield swarm
        finally:
            swarm.end()
