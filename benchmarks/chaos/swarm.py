"""The servers of `chaos`: processes, twins of each other, that are killed, stopped, continued and started again.

A history of each server's states shows for how much of the time every block had a running server. Only a server whose
twin runs may be disturbed, because no client can use blocks without a server. A process that ends although the
benchmark did not end it is a failure.
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
# Each twin has room for all sessions of a run at once.
KV_TOKENS = 8192


class Member:
    """One server of the swarm. A restart keeps the same Member."""

    def __init__(self, name: str, span: Span, peer: PeerProcess) -> None:
        self.name = name
        self.span = span
        self.peer = peer
        self.state: State = "serving"
        # When its state changed to what, from the first time that it served.
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
        """The parts of the time from `since` to `until` in which it served."""
        ends = [*(at for at, _ in self.history[1:]), end]
        parts = [(max(at, start), min(until, end)) for (at, state), until in self._serving(ends)]
        return [(at, until) for at, until in parts if at < until]

    def _serving(self, ends: Sequence[float]) -> list[tuple[tuple[float, State], float]]:
        return [(entry, until) for entry, until in zip(self.history, ends, strict=True) if entry[1] == "serving"]


class ChaosSwarm:
    """A bootstrap peer, which is never disturbed, and for each span a number of twin servers."""

    bootstrap: PeerProcess

    def __init__(self, processes: PeerProcesses, tasks: trio.Nursery) -> None:
        self.members: list[Member] = []
        # Servers that ended although the benchmark did not end them.
        self.ended_by_themselves: list[str] = []
        self._processes = processes
        self._tasks = tasks

    async def start(self, model: Path, spans: Sequence[Span], twins: int) -> None:
        """Start all processes. Returns when they serve. Raises ProcessEnded."""
        self.bootstrap = await self._processes.start()
        async with trio.open_nursery() as nursery:
            for twin in range(twins):
                for number, span in enumerate(spans):
                    name = f"{number + 1}{chr(ord('a') + twin)}"
                    nursery.start_soon(self._start_one, name, span, model, self.bootstrap.address)
        self.members.sort(key=lambda member: member.name)

    async def _start_one(self, name: str, span: Span, model: Path, bootstrap: Multiaddr) -> None:
        serve = ["--serve-blocks", str(span), "--model", str(model), "--bootstrap", str(bootstrap)]
        # Every token is compared with Transformers' own in float32.
        serve += ["--quantize", "none"]
        # Twins announce the same speed, so that they share the work.
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
        """The servers that serve and have a twin that serves too."""
        serving = [member for member in self.members if member.state == "serving"]
        return [one for one in serving if any(two is not one and two.span == one.span for two in serving)]

    def kill(self, member: Member) -> None:
        """Kill its process, without a goodbye."""
        member.be("dead")
        member.peer.process.send_signal(signal.SIGKILL)

    def stop(self, member: Member) -> None:
        """Stop its process. Its connections stay open."""
        member.be("stopped")
        member.peer.process.send_signal(signal.SIGSTOP)

    def go_on(self, member: Member) -> None:
        """Let its process continue."""
        member.peer.process.send_signal(signal.SIGCONT)
        member.be("serving")

    async def start_again(self, member: Member) -> None:
        """Start a killed server again, as the same peer with the same blocks. Returns when it serves. Raises
        ProcessEnded.
        """
        await member.peer.process.wait()
        member.be("starting")
        member.peer = await self._processes.start_again(member.peer)
        member.be("serving")
        self._tasks.start_soon(self._watch, member, member.peer)

    def coverage(self, start: float, end: float) -> dict[Span, float]:
        """The share of a time in which each span had a server."""
        shares = {}
        for span in sorted({member.span for member in self.members}):
            parts = [part for member in self.members if member.span == span for part in member.serving_s(start, end)]
            shares[span] = _union_s(parts) / (end - start)
        return shares

    def covered(self, start: float, end: float) -> bool:
        """Whether every block had a server all the time."""
        return min(self.coverage(start, end).values()) > 1 - 1e-9

    def end(self) -> None:
        """Continue stopped servers, so that they can be told to end, and count no failures from now on."""
        for member in self.members:
            if member.state == "stopped":
                member.peer.process.send_signal(signal.SIGCONT)
            member.state = "dead"

    def left_over(self) -> list[int]:
        """The processes that still run."""
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
    """Open a swarm of processes with one compute thread each. All of them end with the block."""
    async with open_peer_processes(threads=1) as processes, open_tasks() as tasks:
        swarm = ChaosSwarm(processes, tasks)
        try:
            await swarm.start(model, spans, twins)
            yield swarm
        finally:
            swarm.end()
