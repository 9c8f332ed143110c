"""`--memory` is a limit: a server whose KV is all in use stays below it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

import peerd
from peerd.cli.processes import open_peer_processes
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.protocol.messages.session import MAX_LENGTH
from peerd.protocol.records.envelope import ServerRecord
from peerd.server.engine_task import EngineTask
from peerd.server.served_spans import ServedSpan
from peerd.testing.fake_engine import FakeEngine

pytestmark = [pytest.mark.real_time, pytest.mark.model, pytest.mark.processes]

MEMORY_MIB = 320
# The first hop of two: it keeps all that it sends, for a next hop that may die.
OWN, REST = peerd.Span(0, 2), peerd.Span(2, 30)
LISTEN = "/ip4/127.0.0.1/tcp/0/ws"
ROW_TOKENS = 2048
WIDTH = 576

# What the program takes before it serves anything is not bounded.
_IMPORTS = """
import torch, transformers.models.llama.modeling_llama
import peerd.cli.main, peerd.cli.daemon, peerd.spans.devices, peerd.server.engine_task
import peerd.peer, peerd.server.server, peerd.spans.loading
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")))
"""


def peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


@asynccontextmanager
async def fake_rest(path: Path, bootstrap: peerd.Multiaddr) -> AsyncIterator[peerd.Peer]:
    """All other blocks, served by a peer in this process that computes nothing worth while."""
    first = peerd.ServeSpec(path, peerd.Span(29, 30), kv_tokens=16)
    async with peerd.open_peer(listen=[LISTEN], bootstrap=[bootstrap], serve=[first]) as peer:
        engine = FakeEngine(REST, hidden_size=WIDTH, kv_tokens=2**20)
        with open_checkpoint(path) as checkpoint:
            served = ServedSpan(checkpoint.model_digest, MAX_LENGTH, EngineTask(engine))
        assert peer._spans is not None
        (first_slot,) = peer._spans._slots
        assert first_slot.loaded is not None
        slot = peer._spans._slots.reserve(first_slot.record("joining"))
        peer._spans._slots.add(slot, served, replace(first_slot.loaded, engine=engine, roots=()))
        peer.discovery.announce_soon()
        await peer.discovery.wait_announced()
        yield peer


async def test_a_server_with_full_kv_takes_no_more_than_it_was_given(model_path: Path) -> None:
    imports = await trio.run_process([sys.executable, "-c", _IMPORTS], capture_stdout=True)
    imports_mib = int(imports.stdout) / 1024
    serve = ("--serve-blocks", str(OWN), "--model", str(model_path), "--memory", f"{MEMORY_MIB}MiB")
    serve += ("--quantize", "int8", "--throughput", "1234.5")
    async with open_peer_processes(threads=1) as processes:
        server = await processes.start(*serve)
        async with (
            fake_rest(model_path, server.address) as peer,
            peer.model(model_path) as model,
        ):
            own = await announced(peer, model)
            assert (own.quantization, own.throughput) == ("int8", 1234.5)
            free = own.free_tokens
            rows = free // ROW_TOKENS
            async with trio.open_nursery() as nursery:
                hold, running = trio.Event(), []
                for index in range(rows):
                    prompt = [100 + index] + [200] * (ROW_TOKENS - 2)
                    nursery.start_soon(generate_and_hold, model, prompt, running, hold)
                while len(running) < rows:
                    await trio.sleep(0.1)
                taken = peak_mib(server.process.pid) - imports_mib
                hold.set()
    print(f"{rows} rows of {ROW_TOKENS}, of {free} tokens; {taken:.0f} of {MEMORY_MIB} MiB, imports {imports_mib:.0f}")
    assert rows * ROW_TOKENS >= 0.8 * free
    # All of that was there: keys and values of three heads of 64, and what is kept for the next hop.
    used_mib = rows * ROW_TOKENS * (len(OWN) * 2 * 3 * 64 + WIDTH) * 4 / 2**20
    assert used_mib <= taken <= MEMORY_MIB


async def announced(peer: peerd.Peer, model: peerd.SwarmModel) -> ServerRecord:
    """What the server says of itself."""
    offers = await peer.discovery.directory.servers(model.facts.digest, 30)
    return next(offer.record for offer in offers if offer.record.span == OWN)


async def generate_and_hold(model: peerd.SwarmModel, prompt: list[int], running: list[int], hold: trio.Event) -> None:
    async for token in model.generate(prompt, temperature=0, max_new_tokens=2, eos_token_ids=()):
        running.append(token.id)
        await hold.wait()
