"""Real NATs: two private networks behind masquerading, public peers, and real peerd processes in all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from peerd.cli.main import EXIT_NO_CHAIN
from peerd.cli.processes import PeerProcess, PeerProcesses, open_peer_processes
from peerd.cli.watching.asking import ask_daemon
from tests.fakes.netlab import NAT_A, NAT_B, NEIGHBOUR, PUBLIC_HOSTS, RELAY1, RELAY2, A, B, NetLab, missing, open_lab

pytestmark = [pytest.mark.real_time, pytest.mark.processes]

PORT = 31330
LISTEN = f"/ip4/0.0.0.0/tcp/{PORT}/ws"
# For what takes a second or two on a quiet machine.
SOON_S = 60.0
PROMPT = "Once upon a time"
# Time enough for a relay to be killed between the first and the last of them.
NEW_TOKENS = 40
PUNCHING_PEER = Path(__file__).parents[1] / "fakes" / "punching_peer.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def _networks() -> None:
    if why := missing():
        pytest.skip(why)


@pytest.fixture(scope="module")
def expected(reference: Any) -> str:
    """What the model says, as far as rounding cannot change it."""
    answer = reference.answer(reference.encode(PROMPT), NEW_TOKENS)
    text: str = reference.tokenizer.decode(answer.decisive)
    assert len(answer.decisive) > 20
    return text


class World:
    """The lab, and peers on its hosts; the first on `relay1` is the bootstrap peer for all."""

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
        serving += ("--quantize", "none")
        return await self.start(host, *serving, *arguments)

    def generating(self, host: str, model: Path) -> list[str]:
        """`peerd generate` on a host, as a command."""
        asked = ("--prompt", PROMPT, "--max-new-tokens", str(NEW_TOKENS), "--temperature", "0")
        command = (sys.executable, "-m", "peerd", "generate", str(model), *asked, *self._bootstrap)
        return [*self.lab.under(host), *command]


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


async def test_dial_backs_tell_a_nat_from_a_forwarded_port(tmp_path: Path) -> None:
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
        states = {host: await ask_daemon(tmp_path / host, "/peerd/v1/status") for host in ("relay2", "neighbour", "b")}
    reach = {host: state["reachability"]["state"] for host, state in states.items()}
    assert reach == {"relay2": "public", "neighbour": "public", "b": "private"}
    addresses = states["neighbour"]["addresses"]
    assert [address.split("/")[2] for address in addresses] == [NAT_A, NEIGHBOUR]
    assert [address.split("/")[2] for address in states["b"]["addresses"]] == [B]


@pytest.mark.model
async def test_servers_in_two_private_networks_answer_through_relays_even_when_one_is_killed(
    model_path: Path, expected: str, tmp_path: Path
) -> None:
    """The client in one network, a server in each: what one hop pushes to the next crosses both NATs too."""
    async with open_world() as world:
        # Otherwise the servers would meet directly.
        await world.lab.map_ports("nat_a", "symmetric")
        relays = [await world.start("relay1", "--relay"), await world.start("relay2", "--relay")]
        peers: dict[str, PeerProcess] = {}

        async def serve(host: str, blocks: str, *arguments: str) -> None:
            peers[host] = await world.serve(host, blocks, model_path, *arguments)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, "a", "0:15", "--socket", str(tmp_path / "a"))
            nursery.start_soon(serve, "b", "15:30")
        for server in peers.values():
            for relay in relays:
                await wait_to_say(server, f"the relay {relay.peer_id} reaches us")

        process = await trio.lowlevel.open_process(
            world.generating("b", model_path), stdout=subprocess.PIPE, env=ENVIRONMENT
        )
        try:
            assert process.stdout is not None
            printed = await process.stdout.receive_some()
            state = await ask_daemon(tmp_path / "a", "/peerd/v1/status")
            (pushed_to,) = [peer for peer in state["peers"] if peer["peer_id"] == peers["b"].peer_id]
            (victim,) = [relay for relay in relays if relay.peer_id == pushed_to["relay"]]
            victim.process.send_signal(signal.SIGKILL)
            assert process.poll() is None, "the answer was complete before the relay was killed"
            async for chunk in process.stdout:
                printed += chunk
            await process.wait()
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
        assert state["reachability"]["state"] == "private"
    assert process.returncode == 0
    assert printed.decode().startswith(expected)


@asynccontextmanager
async def open_punching(lab: NetLab) -> AsyncIterator[tuple[str, ...]]:
    """Two relays, and a peer on `b` that they reach; yields what a caller needs to know."""
    async with AsyncExitStack() as stack:
        relays = []
        for host, ip in PUBLIC_HOSTS.items():
            peer_id = (await stack.enter_async_context(running(lab, host, "relay")))["peer_id"]
            relays.append(f"/ip4/{ip}/tcp/{PORT}/ws/p2p/{peer_id}")
        reserved = await stack.enter_async_context(running(lab, "b", "reserved", *relays))
        yield (str(reserved["peer_id"]), *relays)


@asynccontextmanager
async def running(lab: NetLab, host: str, *arguments: str) -> AsyncIterator[dict[str, Any]]:
    """A peer of `punching_peer.py`, and the first line that it prints."""
    command = [*lab.under(host), sys.executable, str(PUNCHING_PEER), *arguments]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        with trio.fail_after(SOON_S):
            yield json.loads(await process.stdout.receive_some())
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def calls(lab: NetLab, count: int, known: Sequence[str]) -> list[dict[str, Any]]:
    """How `count` calls from `a` went."""
    printed = await lab.run("a", sys.executable, str(PUNCHING_PEER), "caller", str(count), *known)
    return [json.loads(line) for line in printed.splitlines()]


async def test_peers_behind_two_nats_meet_directly_and_every_time() -> None:
    async with open_lab() as lab, open_punching(lab) as known:
        found = await calls(lab, 20, known)
        await lab.map_ports("nat_a", "endpoint independent")
        found += await calls(lab, 1, known)
    assert [each["way"] for each in found] == ["punched"] * 21


async def test_behind_a_symmetric_nat_a_peer_stays_with_the_relay() -> None:
    async with open_lab() as lab, open_punching(lab) as known:
        await lab.map_ports("nat_a", "symmetric")
        (found,) = await calls(lab, 1, known)
    assert found["way"] == "relayed"


@pytest.mark.model
async def test_a_server_that_may_not_be_relayed_cannot_be_reached_and_the_client_says_so(model_path: Path) -> None:
    async with open_world() as world:
        await world.start("relay1", "--relay")
        server = await world.serve("a", "0:30", model_path, "--no-relay")
        await wait_to_say(server, "others cannot reach us at all")
        command = world.generating("b", model_path)
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (EXIT_NO_CHAIN, b"")
    log = done.stderr.decode()
    assert "no reachable peer serves blocks 0:30" in log
    assert f"{server.peer_id} cannot be reached: /ip4/{A}/tcp/{PORT}/ws" in log
