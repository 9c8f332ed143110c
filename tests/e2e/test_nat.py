"""NATs as they are: two private networks behind masquerading, public peers, and real peerd processes in all of them."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from netlab import NAT_A, NAT_B, NEIGHBOUR, PUBLIC_HOSTS, RELAY1, RELAY2, A, B, NetLab, missing, open_lab

from peerd.cli_status import ask_daemon
from peerd.processes import PeerProcess, PeerProcesses, open_peer_processes

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.processes,
    pytest.mark.skipif(bool(why := missing()), reason=why or "there is a lab"),
]

PORT = 31330
LISTEN = f"/ip4/0.0.0.0/tcp/{PORT}/ws"
# For what takes a second or two on a quiet machine.
SOON_S = 60.0
PROMPT = "Once upon a time"
NEW_TOKENS = 12


class World:
    """The lab, and peers on its hosts; the first on `relay1` is everybody's bootstrap."""

    def __init__(self, lab: NetLab, processes: PeerProcesses) -> None:
        self.lab = lab
        self._processes = processes
        self._bootstrap: tuple[str, ...] = ()

    async def start(self, host: str, *arguments: str) -> PeerProcess:
        peer = await self._processes.start(*arguments, *self._bootstrap, listen=LISTEN, under=self.lab.under(host))
        if host in PUBLIC_HOSTS:
            self._bootstrap += ("--bootstrap", str(peer.address))
        return peer

    async def serve(self, host: str, blocks: str, model: Path, *arguments: str) -> PeerProcess:
        serving = ("--serve-blocks", blocks, "--model", str(model), "--kv-tokens", "1024", "--throughput", "1000")
        return await self.start(host, *serving, *arguments)

    async def generate(self, host: str, model: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
        """`peerd generate` on a host: its exit code, what it printed, and what it logged."""
        asked = ("--prompt", PROMPT, "--max-new-tokens", str(NEW_TOKENS), "--temperature", "0", "--json")
        command = [sys.executable, "-m", "peerd", "generate", str(model), *asked, *self._bootstrap, *arguments]
        done = await trio.run_process(
            [*self.lab.under(host), *command],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return done.returncode, json.loads(done.stdout or b"{}"), done.stderr.decode()


@asynccontextmanager
async def open_world() -> AsyncIterator[World]:
    async with open_lab() as lab, open_peer_processes(threads=1) as processes:
        yield World(lab, processes)


async def wait_to_say(peer: PeerProcess, words: str) -> None:
    with trio.move_on_after(SOON_S):
        while words not in peer.log.read_text():
            await trio.sleep(0.1)
        return
    raise AssertionError(f"it did not say {words!r}: {peer.log.read_text()}")


async def listen_on(lab: NetLab, host: str, task_status: trio.TaskStatus[None]) -> None:
    """A plain TCP server."""
    code = f"import socket; s = socket.create_server(('', {PORT})); print('up', flush=True)\nwhile True: s.accept()"
    command = [*lab.under(host), sys.executable, "-c", code]
    process = await trio.lowlevel.open_process(command, stdout=-1)
    try:
        assert process.stdout is not None
        await process.stdout.receive_some()
        task_status.started()
        await trio.sleep_forever()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def test_the_nats_let_out_but_not_in() -> None:
    expected = {
        ("a", RELAY1): True,
        ("b", RELAY1): True,
        ("a", NEIGHBOUR): True,
        ("neighbour", A): True,
        ("relay1", A): False,
        ("relay1", NAT_A): False,
        ("b", A): False,
        ("b", NAT_A): False,
        ("a", B): False,
        ("a", NAT_B): False,
    }
    found = {}
    async with open_lab() as lab, trio.open_nursery() as nursery:
        for host in ("relay1", "a", "b", "neighbour"):
            await nursery.start(listen_on, lab, host)

        async def look(host: str, ip: str) -> None:
            found[host, ip] = await lab.can_connect(host, ip, PORT)

        async with trio.open_nursery() as looking:
            for host, ip in expected:
                looking.start_soon(look, host, ip)
        await lab.forward("nat_a", PORT, A)
        forwarded = await lab.can_connect("relay1", NAT_A, PORT)
        nursery.cancel_scope.cancel()
    assert found == expected
    assert forwarded


async def test_dial_backs_tell_who_is_behind_a_nat_and_who_has_a_forwarded_port(tmp_path: Path) -> None:
    async with open_world() as world:
        await world.start("relay1")
        await world.lab.forward("nat_a", PORT, NEIGHBOUR)
        peers: dict[str, PeerProcess] = {}

        async def start(host: str) -> None:
            peers[host] = await world.start(host, "--socket", str(tmp_path / host))

        async with trio.open_nursery() as nursery:
            for host in ("relay2", "neighbour", "b"):
                nursery.start_soon(start, host)
        await wait_to_say(peers["relay2"], f"others can dial us at /ip4/{RELAY2}/tcp/{PORT}/ws")
        # Its port is forwarded; it announces an address that none of its interfaces has.
        await wait_to_say(peers["neighbour"], f"others can dial us at /ip4/{NAT_A}/tcp/{PORT}/ws")
        await wait_to_say(peers["b"], f"nobody can dial us at /ip4/{NAT_B}/tcp/{PORT}/ws (silent)")
        states = {host: await ask_daemon(tmp_path / host) for host in ("relay2", "neighbour", "b")}
    reach = {host: state["reachability"]["state"] for host, state in states.items()}
    assert reach == {"relay2": "public", "neighbour": "public", "b": "private"}
    addresses = states["neighbour"]["addresses"]
    assert [address.split("/")[2] for address in addresses] == [NAT_A, NEIGHBOUR]
    assert [address.split("/")[2] for address in states["b"]["addresses"]] == [B]


@pytest.mark.model
async def test_servers_in_two_private_networks_answer_through_a_relay_and_when_it_dies_through_another(
    model_path: Path, reference: Any, tmp_path: Path
) -> None:
    """The client in one network, a server in each: what one hop pushes to the next crosses both NATs too."""
    answer = reference.answer(reference.encode(PROMPT), NEW_TOKENS)
    async with open_world() as world:
        relay = await world.start("relay1", "--relay")
        other = await world.start("relay2", "--relay")
        peers: dict[str, PeerProcess] = {}

        async def serve(host: str, blocks: str, *arguments: str) -> None:
            peers[host] = await world.serve(host, blocks, model_path, "--socket", str(tmp_path / host), *arguments)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, "a", "0:15")
            nursery.start_soon(serve, "b", "15:30")
        for server in peers.values():
            for one in (relay, other):
                await wait_to_say(server, f"the relay {one.peer_id} reaches us")

        code, said, log = await world.generate("b", model_path)
        assert code == 0, log
        assert tuple(said["token_ids"][: len(answer.decisive)]) == answer.decisive
        assert [hop["peer"] for hop in said["chain"]] == [peers["a"].peer_id, peers["b"].peer_id]
        assert said["failovers"] == 0
        state = await ask_daemon(tmp_path / "a")
        assert state["reachability"]["state"] == "private"
        (pushed_to,) = [peer for peer in state["peers"] if peer["peer_id"] == peers["b"].peer_id]
        assert pushed_to["relay"] in (relay.peer_id, other.peer_id)

        # Whoever uses nobody's relay gets nowhere, and hears why.
        code, said, log = await world.generate("b", model_path, "--no-relay")
        assert code != 0
        assert "we use no relays" in log, log

        victim = relay if pushed_to["relay"] == relay.peer_id else other
        victim.process.send_signal(signal.SIGKILL)
        code, said, log = await world.generate("b", model_path)
        assert code == 0, log
        assert tuple(said["token_ids"][: len(answer.decisive)]) == answer.decisive
