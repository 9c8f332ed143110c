"""Real servers that move: a span without a server gets one, and no session is cut for it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import trio

import peerd
from peerd.cli.processes import PeerProcess, PeerProcesses, open_peer_processes
from peerd.routing.chains.rules import ChainRules
from peerd.routing.directory.directory import Directory

pytestmark = [pytest.mark.real_time, pytest.mark.model, pytest.mark.processes]

QUESTION = "Why is the sky blue?"
NEW_TOKENS = 8
LOOK_S = 4


async def start_servers(processes: PeerProcesses, path: Path, *spans: str) -> list[PeerProcess]:
    """A bootstrap peer, one server a span, and at last one that goes wherever it is needed."""
    bootstrap = await processes.start()
    common = ("--model", str(path), "--bootstrap", str(bootstrap.address), "--kv-tokens", "2048", "--throughput", "500")
    common += ("--quantize", "none")
    servers: list[PeerProcess] = []

    async def start(span: str) -> None:
        servers.append(await processes.start("--serve-blocks", span, *common))

    async with trio.open_nursery() as nursery:
        for span in spans:
            nursery.start_soon(start, span)
    mover = await processes.start("--serve-blocks", "10", "--look-every", str(LOOK_S), *common)
    return [bootstrap, *servers, mover]


async def until(directory: Directory, digest: bytes, seen: Callable[[set[tuple[str, str, str]]], bool]) -> None:
    """Wait until the swarm's records show it: which server, which blocks, in which state."""
    while not seen(
        {(one.peer_id, str(one.record.span), one.record.state) for one in await directory.holdings(digest, 30)}
    ):
        await trio.sleep(0.25)


async def test_a_server_moves_to_close_a_gap_and_lets_its_session_end_first(model_path, reference) -> None:
    async with open_peer_processes(threads=1) as processes:
        bootstrap, *servers, mover = await start_servers(processes, model_path, "0:10", "10:20", "20:30")
        prompt = reference.encode(QUESTION, chat=True)
        states = reference.hidden_states(prompt)
        only_mover = ChainRules(allowed=frozenset({mover.peer_id}))
        async with (
            peerd.open_peer(bootstrap=[bootstrap.address], rules=only_mover) as client,
            client.model(model_path) as model,
        ):
            directory, digest = client.discovery.directory, model.facts.digest
            async with model.session(max_length=len(prompt), blocks=peerd.Span(0, 10)) as session:
                before = await session.step(states[0][:-2], want="all")
                async with trio.open_nursery() as nursery:
                    for server in servers:
                        # The only server of the last blocks leaves.
                        nursery.start_soon(leave_if_it_has, "20:30", server)
                await until(directory, digest, lambda seen: (mover.peer_id, "0:10", "draining") in seen)
                await trio.sleep(LOOK_S)
                after = await session.step(states[0][-2:], want="all")
                assert session.failovers == 0
                assert torch.allclose(torch.cat([before, after]), states[10], atol=1e-3)
            await until(directory, digest, lambda seen: (mover.peer_id, "20:30", "online") in seen)
        async with peerd.open_peer(bootstrap=[bootstrap.address]) as client, client.model(model_path) as model:
            answer = reference.answer(prompt, NEW_TOKENS)
            generation = model.generate(QUESTION, chat=True, temperature=0, max_new_tokens=NEW_TOKENS)
            async for _ in generation:
                pass
            assert tuple(generation.token_ids[: len(answer.decisive)]) == answer.decisive
            assert generation.chain[-1].peer == mover.peer_id
        assert "moved from blocks 0:10 to 20:30" in mover.log.read_text()


async def leave_if_it_has(span: str, server: PeerProcess) -> None:
    if f"serving blocks {span}" in server.log.read_text():
        server.process.send_signal(signal.SIGTERM)
        await server.process.wait()
