"""Servers with llama.cpp and servers with torch compute one answer, and take over from one another."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

import peerd
from peerd.cli.processes import open_peer_processes
from peerd.compute.llamacpp.library import is_installed

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.model,
    pytest.mark.processes,
    pytest.mark.skipif(not is_installed(), reason="xllamacpp is not installed"),
]

QUESTION = "Explain what a list comprehension is."
NEW_TOKENS = 16
# llama.cpp rounds activations to 8 bits, which moves logits by some tenths.
DECISIVE = 1.0


@asynccontextmanager
async def open_servers(model_path: Path, *serving: tuple[str, str]) -> AsyncIterator[list[Any]]:
    """A bootstrap peer, and a server for each pair of a span and an engine."""
    async with open_peer_processes(threads=1) as processes:
        bootstrap = await processes.start()
        found: list[Any] = [None] * len(serving)

        async def start(index: int, span: str, engine: str) -> None:
            exact = ("--quantize", "none") if engine == "torch" else ()
            join = ("--bootstrap", str(bootstrap.address), "--kv-tokens", "2048", "--engine", engine, *exact)
            found[index] = await processes.start("--serve-blocks", span, "--model", str(model_path), *join)

        async with trio.open_nursery() as nursery:
            for index, (span, engine) in enumerate(serving):
                nursery.start_soon(start, index, span, engine)
        yield [bootstrap, *found]


async def test_an_answer_moves_from_a_server_of_one_engine_to_one_of_the_other(model_path, reference):
    answer = reference.answer(reference.encode(QUESTION, chat=True), NEW_TOKENS)
    close = [index for index, margin in enumerate(answer.margins) if margin <= DECISIVE]
    sure = answer.token_ids[: min(close, default=NEW_TOKENS)]
    assert len(sure) >= 5
    serving = (("0:15", "llamacpp"), ("15:30", "llamacpp"), ("15:30", "torch"))
    async with (
        open_servers(model_path, *serving) as (bootstrap, *servers),
        peerd.open_peer(bootstrap=[bootstrap.address]) as client,
        client.model(model_path) as model,
    ):
        generation = model.generate(QUESTION, chat=True, temperature=0, max_new_tokens=NEW_TOKENS, speculate=False)
        async for _ in generation:
            if len(generation.token_ids) == 2:
                last = generation.chain[1].peer
                victim = next(server for server in servers if server.peer_id == last)
                victim.process.send_signal(signal.SIGKILL)
        assert generation.failovers == 1
        assert tuple(generation.token_ids[: len(sure)]) == sure
        assert {hop.peer for hop in generation.chain} == {server.peer_id for server in servers if server is not victim}


async def test_answers_that_are_given_up_free_what_they_held(model_path):
    spec = peerd.ServeSpec(model_path, peerd.Span(0, 30), kv_tokens=1024, engine="llamacpp")
    async with (
        peerd.open_peer(listen=["/ip4/127.0.0.1/tcp/0/ws"], serve=[spec]) as server,
        peerd.open_peer(bootstrap=server.addresses) as client,
        client.model(model_path) as model,
    ):
        engine = server.served[0].task.engine
        for _ in range(3):
            with trio.CancelScope() as scope:
                async for _ in model.generate(QUESTION, chat=True, max_new_tokens=200, temperature=0):
                    scope.cancel()
        with trio.fail_after(10):
            while engine.free_tokens < engine.total_tokens:
                await trio.sleep(0.05)
        generation = model.generate(QUESTION, chat=True, temperature=0, max_new_tokens=8)
        async for _ in generation:
            pass
        assert generation.text.startswith("A list comprehension")
        assert generation.failovers == 0
