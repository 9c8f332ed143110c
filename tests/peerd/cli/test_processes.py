"""Peers as processes: failures to start, and that no process outlives the one that started it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import trio

from peerd.cli.processes import ProcessEnded, open_peer_processes
from peerd.protocol.addresses import Multiaddr

pytestmark = [pytest.mark.processes, pytest.mark.real_time]

# A peer on a busy machine is not to be killed while it ends in good order.
STOP_S = 30.0

STARTER = """
import trio
from peerd.cli.processes import open_peer_processes

async def main():
    async with open_peer_processes(threads=1) as processes:
        print((await processes.start()).address, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


async def test_a_peer_that_ends_before_it_is_up_is_reported_with_its_log() -> None:
    async with open_peer_processes(threads=1) as processes:
        with pytest.raises(ProcessEnded, match=r"(?s)exit code 2: .*add --serve-blocks"):
            await processes.start("--kv-tokens", "64")


async def test_processes_are_gone_when_their_block_ends() -> None:
    async with open_peer_processes(threads=1, stop_s=STOP_S) as processes:
        peer = await processes.start()
        await _connect(peer.address)
    assert peer.process.returncode == 0


async def test_a_peer_that_was_killed_runs_again_as_the_same_peer_in_the_same_place() -> None:
    async with open_peer_processes(threads=1, stop_s=STOP_S) as processes:
        peer = await processes.start()
        peer.process.kill()
        await peer.process.wait()
        again = await processes.start_again(peer)
        assert again.address == peer.address
        await _connect(peer.address)
    assert again.process.returncode == 0


async def test_processes_end_even_if_the_process_that_started_them_is_killed() -> None:
    starter = await trio.lowlevel.open_process([sys.executable, "-c", STARTER], stdout=subprocess.PIPE)
    assert starter.stdout is not None
    async with starter.stdout as printed:
        address = Multiaddr.parse((await printed.receive_some()).decode().strip())
        await _connect(address)
        starter.kill()
        await starter.wait()
    while await _connects(address):
        await trio.sleep(0.05)


async def _connect(address: Multiaddr) -> None:
    await (await trio.open_tcp_stream(address.host, address.port)).aclose()


async def _connects(address: Multiaddr) -> bool:
    try:
        await _connect(address)
    except OSError:
        return False
    return True
