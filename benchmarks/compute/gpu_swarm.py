"""Runs a whole BLOOM-176B in nf4 on one GPU behind three peers, over links of several qualities, as in the papers'
table.

The peers are processes of their own that share the GPU. Delaying proxies (`delayed_link`) stand between them and the
client. Weights are random, and made block by block where they are quantized. The client sends random hidden states:
embeddings and head are not measured, and would not fit into the table. The figures are those of the papers (arXiv
2209.01188, table 3; 2312.08361, table 1): steps a second of one sequence at two lengths, and tokens a second of a
forward of 128 positions at batch 1 and 64. Here every hop pushes to the next, so a step crosses four links one way.

Run it by `python -m benchmarks.compute.gpu_bench --part swarm`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trio

from benchmarks.compute.random_checkpoint import random_checkpoint
from benchmarks.swarms.delayed_link import DelayedLink, Quality, free_port, open_delayed_link
from peerd.checkpoints import Checkpoints
from peerd.cli.demo import even_spans
from peerd.client.finding.finder import SwarmFinder
from peerd.client.model import ModelFacts, SwarmModel
from peerd.client.session.opener import ChainOpener
from peerd.client.session.session import Session
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.peer import Peer, open_peer
from peerd.protocol.encoding.tensors import DTYPE_NAMES, DTYPES
from peerd.protocol.messages.session import MAX_LENGTH
from peerd.protocol.rows import RowSlice
from peerd.protocol.span import Span
from peerd.spans.spec import ServeSpec
from peerd.trio_tools import open_tasks

REPOSITORY = Path(__file__).parents[2]
PEERS = 3
# The papers' axes: round trips, and each link's rate in each direction.
RTTS_MS = (0, 5, 100)
MBITS = (1000, 100)
FAST = Quality()


@dataclass(frozen=True)
class Sizes:
    """What to measure. `step_positions`: how many positions of a forward travel in one step."""

    contexts: tuple[int, ...]
    steps: int
    forward_rows: tuple[int, ...]
    forward_length: int
    step_rows: int


FULL = Sizes((128, 2048), 10, (1, 64), 128, 16)
TINY = Sizes((8, 24), 2, (1, 4), 8, 2)


def swarm_part(name: str, device: torch.device, dtype: torch.dtype, *, tiny: bool, blocks: int | None) -> list[str]:
    """Run all measurements, and return the table as lines of Markdown."""
    return trio.run(_measure, name, device, dtype, TINY if tiny else FULL, blocks)


async def _measure(name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes, blocks: int | None) -> list[str]:
    checkpoint = random_checkpoint(name, "cpu", dtype)
    count = blocks or checkpoint.block_count
    began = time.perf_counter()
    async with AsyncExitStack() as stack:
        links, addresses = await stack.enter_async_context(_peers(name, device, dtype, sizes, count))
        peer = await stack.enter_async_context(open_peer(bootstrap=addresses))
        model = await stack.enter_async_context(_client(peer, checkpoint, dtype))
        _say(f"{count} blocks are served after {time.perf_counter() - began:.0f} s")
        rows = await _table(model, links, sizes, Span(0, count))
    head = ["rate", "round trip"]
    head += [f"steps/s at {context}" for context in sizes.contexts]
    head += [f"forward tokens/s, batch {batch}" for batch in sizes.forward_rows]
    lines = [f"## {name} in nf4, {count} blocks on {PEERS} peers that share {device}", ""]
    for cells in (head, ["---"] * len(head), *rows):
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


async def _table(model: SwarmModel, links: Sequence[DelayedLink], sizes: Sizes, blocks: Span) -> list[list[str]]:
    """Measure a row for each quality. Sessions stay open while the links beneath them change."""
    hidden = torch.randn(max(*sizes.contexts, sizes.step_rows * sizes.forward_length), model.facts.width)
    hidden = hidden.to(DTYPES[model.facts.dtype])
    longest = max(sizes.contexts)
    qualities = [Quality(rtt_ms / 2000, mbit * 1e6) for mbit in MBITS for rtt_ms in RTTS_MS]
    rows = [[f"{mbit} Mbit/s", f"{rtt_ms} ms"] for mbit in MBITS for rtt_ms in RTTS_MS]
    found: dict[int, list[str]] = {}
    async with model.session(max_length=longest + 16, max_rollback=longest, blocks=blocks) as session:
        await session.step(hidden[:longest])
        # The longest context comes first: after a shorter one, the row would have to be sent again.
        for context in sorted(sizes.contexts, reverse=True):
            found[context] = []
            for quality in qualities:
                _set(links, quality)
                found[context].append(f"{1 / await _step_s(session, hidden, context, sizes.steps):.2f}")
            _say(f"steps/s at {context}: {', '.join(found[context])}")
    _set(links, FAST)
    length = sizes.forward_length
    async with model.session(
        max_length=length, max_rows=sizes.step_rows, max_rollback=length, blocks=blocks
    ) as session:
        for cells, quality, *steps in zip(rows, qualities, *(found[each] for each in sizes.contexts), strict=True):
            _set(links, quality)
            cells += steps
            for batch in sizes.forward_rows:
                tokens = batch * length
                cells.append(f"{tokens / await _forward_s(session, hidden, batch, sizes):.1f}")
            _say(" | ".join(cells))
    return rows


def _set(links: Sequence[DelayedLink], quality: Quality) -> None:
    for link in links:
        link.set_quality(quality)


async def _step_s(session: Session, hidden: torch.Tensor, context: int, steps: int) -> float:
    """Seconds of one more position after `context`. Positions after `context` are rolled back."""
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        await session.step(hidden[:1], start=context - 1)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


async def _forward_s(session: Session, hidden: torch.Tensor, batch: int, sizes: Sizes) -> float:
    """Seconds of a forward of `batch` sequences until all results are back. It is sent in steps of some rows each,
    without waiting between them.
    """
    length = sizes.forward_length
    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for first in range(0, batch, sizes.step_rows):
            count = min(sizes.step_rows, batch - first)
            rows = [RowSlice(row, 0, length) for row in range(count)]

            async def step(rows: list[RowSlice] = rows) -> None:
                await session.step(hidden[: len(rows) * length], rows=rows, want="all")

            nursery.start_soon(step)
    return time.perf_counter() - began


@asynccontextmanager
async def _client(peer: Peer, checkpoint: Checkpoint, dtype: torch.dtype) -> AsyncIterator[SwarmModel]:
    """The model without its head, which random hidden states do not need."""
    facts = ModelFacts(
        name=checkpoint.name,
        digest=checkpoint.model_digest,
        block_count=checkpoint.block_count,
        width=checkpoint.hidden_size,
        max_length=checkpoint.max_length or MAX_LENGTH,
        dtype=DTYPE_NAMES[dtype],
    )
    found = peer.discovery
    finder = SwarmFinder(found.directory, found.track_record, facts.digest, facts.block_count, random.Random(1))
    opener = ChainOpener(peer.connections, peer.identity, found.directory, found.clock, random.randbytes)
    async with open_tasks() as tasks:
        nothing: Any = None
        yield SwarmModel(facts, nothing, nothing, nothing, finder, opener, tasks)


@asynccontextmanager
async def _peers(
    name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes, blocks: int
) -> AsyncIterator[tuple[list[DelayedLink], list[str]]]:
    """Start the serving processes, each behind a link, all loading at once. Yields the links and a bootstrap
    address.
    """
    kv_tokens = max(sizes.contexts) + 16 + sizes.step_rows * (sizes.forward_length + 16) + 64
    async with AsyncExitStack() as stack:
        links: list[DelayedLink] = []
        lines: dict[int, str] = {}

        async def start(index: int, span: Span, port: int, bootstrap: Sequence[str]) -> None:
            command = [sys.executable, "-m", "benchmarks.compute.gpu_swarm", name, str(span), "--device", str(device)]
            command += ["--dtype", DTYPE_NAMES[dtype], "--port", str(port), "--announce", str(links[index].port)]
            command += ["--kv-tokens", str(kv_tokens)]
            for address in bootstrap:
                command += ["--bootstrap", address]
            process = await trio.lowlevel.open_process(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY
            )
            stack.push_async_callback(_stop, process)
            assert process.stdout is not None
            received = b""
            while not received.endswith(b"\n"):
                data = await process.stdout.receive_some(4096)
                if not data:
                    raise RuntimeError(f"the peer of blocks {span} ended before it served; see above")
                received += data
            lines[index] = received.decode().split()[-1]

        # The first peer is alone, and the others meet through it. It only keeps the directory until its blocks are
        # loaded.
        spans = even_spans(blocks, PEERS)
        ports = [free_port() for _ in spans]
        for port in ports:
            links.append(await stack.enter_async_context(open_delayed_link(port, FAST)))
        async with open_peer(listen=["/ip4/127.0.0.1/tcp/0/ws"]) as directory:
            bootstrap = [str(address) for address in directory.addresses]
            async with trio.open_nursery() as nursery:
                for index, (span, port) in enumerate(zip(spans, ports, strict=True)):
                    nursery.start_soon(start, index, span, port, bootstrap)
            yield links, bootstrap


async def _stop(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        process.terminate()
        with trio.move_on_after(5):
            await process.wait()
            return
        process.kill()
        await process.wait()


async def _serve(chosen: argparse.Namespace) -> None:
    """Run one real peer, with random weights."""
    device, dtype = torch.device(chosen.device), DTYPES[chosen.dtype]
    checkpoint = random_checkpoint(chosen.name, device, dtype)

    @asynccontextmanager
    async def opened(*_: object) -> AsyncIterator[Checkpoint]:
        yield checkpoint

    Checkpoints.open = opened  # type: ignore[method-assign, assignment]
    spec = ServeSpec(
        chosen.name,
        chosen.span,
        dtype=chosen.dtype,
        device=chosen.device,
        kv_tokens=chosen.kv_tokens,
        quantize="nf4",
    )
    async with open_peer(
        listen=[f"/ip4/127.0.0.1/tcp/{chosen.port}/ws"],
        announce=[f"/ip4/127.0.0.1/tcp/{chosen.announce}/ws"],
        bootstrap=chosen.bootstrap,
        serve=[spec],
    ) as peer:
        print(peer.addresses[0], flush=True)
        # If the process that started us is killed, our standard input ends.
        async with trio.lowlevel.FdStream(sys.stdin.fileno()) as stream:
            async for _ in stream:
                pass


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="one of the peers; `gpu_bench.py` starts it")
    parser.add_argument("name")
    parser.add_argument("span", type=Span.parse)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--announce", type=int, required=True)
    parser.add_argument("--kv-tokens", type=int, required=True)
    parser.add_argument("--bootstrap", action="append", default=[])
    chosen = parser.parse_args()
    if chosen.device == "cpu":
        torch.set_num_threads(1)
    trio.run(_serve, chosen)


if __name__ == "__main__":
    main()
