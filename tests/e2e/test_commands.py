"""The commands that people type, against a swarm of real processes with the real model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from peerd.cli.processes import open_peer_processes

from .test_local_api import QUESTION, ask

pytestmark = [pytest.mark.real_time, pytest.mark.model, pytest.mark.processes]


async def run(*arguments: str, typed: str = "") -> str:
    """What a command prints, given what is typed into its standard input."""
    done = await trio.run_process(
        [sys.executable, "-m", "peerd", *arguments], stdin=typed.encode(), capture_stdout=True, capture_stderr=True
    )
    assert b"Traceback" not in done.stderr
    return done.stdout.decode()


async def test_commands_see_and_use_a_swarm(model_path: Path, reference: Any, tmp_path: Path) -> None:
    socket = tmp_path / "peerd.sock"
    decisive = reference.tokenizer.decode(
        reference.answer(reference.encode(QUESTION, chat=True), 12).decisive, skip_special_tokens=True
    )
    typed = f"/set temperature 0\n/set max_tokens 12\n{QUESTION}\n"
    async with open_peer_processes(threads=1) as processes:
        bootstrap = await processes.start()
        join = ["--bootstrap", str(bootstrap.address)]
        server = await processes.start("--serve-blocks", "auto", "--model", str(model_path), *join)
        own = await run("chat", str(model_path), *join, typed=typed)
        await processes.start("--client", "--model", f"smol={model_path}", "--socket", str(socket), *join)
        shared = await run("chat", "--socket", str(socket), "--no-history", typed=typed)
        assert own.startswith(decisive)
        assert shared.startswith(decisive)
        peers = json.loads(await run("peers", "--json", "--socket", str(socket)))
        assert [(each["peer_id"], each["start"], each["end"]) for each in peers["servers"]] == [(server.peer_id, 0, 30)]
        assert {each["peer_id"] for each in peers["others"]} == {bootstrap.peer_id}
        found = json.loads(await run("doctor", "--json", "--socket", str(socket), *join))["findings"]
        levels = {finding["what"]: finding["level"] for finding in found}
        assert levels["bootstrap"] == levels["clock"] == levels["daemon"] == levels["device"] == "ok"
        status, figures = await ask(socket, "/metrics")
        assert status == 200
        assert b'\npeerd_answers_total{end="complete"} 1.0\n' in figures
        assert b"\npeerd_hop_delay_seconds_count 1.0\n" in figures
