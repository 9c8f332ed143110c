"""Peers in processes of their own, each behind a delaying proxy, so that links between any two of them cost the same.

Two peers share one connection, and either may have dialled it. A peer announces its proxy's address, so the dialler
connects to the proxy of the peer that it dials. Every link therefore crosses exactly one proxy, once in each direction.
The proxies run in a process of their own (this file, run as a program), because a client that computes would delay them
further. The delays can change while the peers run. The proxies also measure the real delays.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from benchmarks.swarms.delayed_link import DelayedLink, Passed, Quality, free_port, open_delayed_link
from peerd.cli.processes import PeerProcess, PeerProcesses
from peerd.protocol.span import Span

REPOSITORY = Path(__file__).parents[2]
# Sent instead of a round trip time: the process reports what passed, and counts anew.
REPORT = "report"


class Proxies:
    """The proxies' process, with one proxy in front of each port."""

    def __init__(self, process: trio.Process) -> None:
        self.ports: list[int] = []
        self._process = process
        self._buffer = b""

    async def set_rtt(self, rtt_ms: float) -> None:
        """Set the round trip time over each proxy, from now on."""
        await self._ask(str(rtt_ms))

    async def passed(self) -> list[tuple[Passed, Passed]]:
        """What has passed each proxy since the last call: towards its peer, and from it."""
        return [(Passed(*there), Passed(*back)) for there, back in json.loads(await self._ask(REPORT))]

    async def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(f"{line}\n".encode())
        return await self.line()

    async def line(self) -> str:
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            data = await self._process.stdout.receive_some()
            assert data, "the proxies' process ended"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode()


@asynccontextmanager
async def open_proxies(targets: Sequence[int]) -> AsyncIterator[Proxies]:
    """Open a proxy before each of these ports, without delay at first, for the block."""
    command = [sys.executable, "-m", "benchmarks.swarms.delayed_swarm", *map(str, targets)]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY)
    try:
        proxies = Proxies(process)
        proxies.ports = json.loads(await proxies.line())
        yield proxies
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


@dataclass(frozen=True)
class DelayedSwarm:
    """Servers in the order of their blocks, and the proxy before each."""

    bootstrap: PeerProcess
    servers: tuple[PeerProcess, ...]
    spans: tuple[Span, ...]
    proxies: Proxies


@asynccontextmanager
async def open_delayed_swarm(
    processes: PeerProcesses, model: Path, spans: Sequence[Span]
) -> AsyncIterator[DelayedSwarm]:
    """Open one server for each span, which others reach through its proxy only. Other peers have no proxy."""
    bootstrap = await processes.start()
    ports = [free_port() for _ in spans]
    async with open_proxies(ports) as proxies:
        servers: dict[int, PeerProcess] = {}

        async def start(number: int, span: Span) -> None:
            servers[number] = await processes.start(
                *("--serve-blocks", str(span), "--model", str(model), "--bootstrap", str(bootstrap.address)),
                *("--quantize", "none", "--announce", f"/ip4/127.0.0.1/tcp/{proxies.ports[number]}/ws"),
                listen=f"/ip4/127.0.0.1/tcp/{ports[number]}/ws",
            )

        async with trio.open_nursery() as nursery:
            for number, span in enumerate(spans):
                nursery.start_soon(start, number, span)
        yield DelayedSwarm(bootstrap, tuple(servers[number] for number in sorted(servers)), tuple(spans), proxies)


async def _run(targets: Sequence[int]) -> None:
    async with AsyncExitStack() as stack:
        links = [await stack.enter_async_context(open_delayed_link(target, Quality())) for target in targets]
        print(json.dumps([link.port for link in links]), flush=True)
        buffer = b""
        async for data in trio.lowlevel.FdStream(sys.stdin.fileno()):
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                print(_answer(line.decode(), links), flush=True)


def _answer(line: str, links: Sequence[DelayedLink]) -> str:
    if line != REPORT:
        for link in links:
            link.set_quality(Quality(float(line) / 2000))
        return "done"
    passed = [[(one.pieces, one.bytes, one.seconds) for one in (link.there.passed, link.back.passed)] for link in links]
    for link in links:
        link.there.passed = link.back.passed = Passed()
    return json.dumps(passed)


if __name__ == "__main__":
    trio.run(_run, [int(port) for port in sys.argv[1:]])
