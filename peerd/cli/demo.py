"""`peerd demo`: starts a swarm on this machine and asks it a question.

The bootstrap peer and the servers are separate processes, as on separate machines; this process is the client.
Everything that can start at the same time does, because importing torch takes seconds in each process.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path

import torch
import trio

from peerd.cli.console import say, short, table, working, write
from peerd.cli.demo_model import fetch_demo_model
from peerd.cli.generate import Request, answer, figures, report
from peerd.cli.processes import PeerProcess, PeerProcesses, open_peer_processes, threads_each
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.peer import open_peer
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.span import Span
from peerd.trio_tools import open_tasks


async def demo(request: Request, servers: int, *, as_json: bool) -> None:
    """Start a swarm, ask it a question, and stop it. The model is downloaded first if it is not here.

    Raises PeerdError, CheckpointError, ProcessEnded.
    """
    path = await fetch_demo_model()
    threads = threads_each(servers)
    torch.set_num_threads(threads)
    async with AsyncExitStack() as stack:
        with working(f"starting a bootstrap peer and {servers} servers"):
            processes = await stack.enter_async_context(open_peer_processes(threads=threads))
            tasks = await stack.enter_async_context(open_tasks())
            swarm = _Swarm(processes, path)
            await tasks.start(swarm.start, servers)
            peer = await stack.enter_async_context(open_peer(bootstrap=[swarm.bootstrap.address]))
            model = await stack.enter_async_context(peer.model(path))
            await swarm.serving.wait()
        if as_json:
            say(swarm.describe())
        else:
            write(f"{swarm.describe()}\n\n> {request.prompt}\n")
        generation = await answer(model, request, quiet=as_json)
        write(f"{report(generation)}\n" if as_json else f"\n{figures(generation)}\n")


def even_spans(blocks: int, count: int) -> list[Span]:
    """Cut `blocks` into `count` spans whose lengths differ by at most one. Raises InvalidRequest."""
    if count > blocks:
        raise InvalidRequest(f"the model has {blocks} blocks, too few for {count} servers")
    ends = [blocks * number // count for number in range(count + 1)]
    return [Span(start, end) for start, end in pairwise(ends)]


class _Swarm:
    """The demonstration's processes: a bootstrap peer, and one server for each span."""

    bootstrap: PeerProcess

    def __init__(self, processes: PeerProcesses, model: Path) -> None:
        self.serving = trio.Event()
        self._processes = processes
        self._model = model
        self._servers: dict[Span, PeerProcess] = {}

    async def start(self, servers: int, task_status: trio.TaskStatus[None]) -> None:
        """Reports that it has started when the swarm can be joined; `serving` is set when all blocks are served."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._start_bootstrap)
            spans = even_spans(await trio.to_thread.run_sync(_count_blocks, self._model), servers)
        task_status.started()
        async with trio.open_nursery() as nursery:
            for span in spans:
                nursery.start_soon(self._start_server, span)
        self.serving.set()

    def describe(self) -> str:
        """Which process serves which blocks."""
        rows = [("peer", "serves", "address")]
        for span, server in sorted(self._servers.items()):
            rows.append((short(server.peer_id), f"blocks {span}", str(server.address.with_peer(None))))
        rows.append((short(self.bootstrap.peer_id), "bootstrap", str(self.bootstrap.address.with_peer(None))))
        return f"{self._model.stem} on {len(self._servers)} servers\n\n{table(rows)}"

    async def _start_bootstrap(self) -> None:
        self.bootstrap = await self._processes.start()

    async def _start_server(self, span: Span) -> None:
        self._servers[span] = await self._processes.start(
            "--serve-blocks", str(span), "--model", str(self._model), "--bootstrap", str(self.bootstrap.address)
        )


def _count_blocks(path: Path) -> int:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.block_count
