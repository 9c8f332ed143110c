"""Starts and ends peers as separate processes on this machine, for demonstrations, examples and tests.

No process may be left behind. They are stopped in a shielded clean-up, whatever ended the caller, and each has the read
end of a pipe from us as its standard input, so that it ends even if we are killed.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import trio

from peerd.net.containment import STRICT_VARIABLE
from peerd.protocol.addresses import Multiaddr

# A demonstration's sessions need no longer.
STOP_S = 0.5
# Any free port, on this machine only.
ANY_PORT = "/ip4/127.0.0.1/tcp/0/ws"
_LOG_TAIL_CHARS = 2000
_READ_BYTES = 4096


def _is_kept(variable: str) -> bool:
    return variable == STRICT_VARIABLE or not variable.startswith("PEERD_")


class ProcessEnded(Exception):
    """A peer's process ended before it served. The message contains the end of its log."""


@dataclass(frozen=True, slots=True)
class PeerProcess:
    """A running peer. `address` is the first that it printed, with its PeerId."""

    process: trio.Process
    address: Multiaddr
    log: Path
    identity: Path
    arguments: tuple[str, ...]
    under: tuple[str, ...] = ()

    @property
    def peer_id(self) -> str:
        """The process's PeerId."""
        return str(self.address.peer_id)


class PeerProcesses:
    """The processes of one `open_peer_processes`. Several tasks may start processes at the same time."""

    def __init__(self, directory: Path, threads: int, stop_s: float = STOP_S) -> None:
        self._directory = directory
        self._stop_s = stop_s
        # What the user has configured is for the user's own daemon.
        others = {name: text for name, text in os.environ.items() if _is_kept(name)}
        self._environment = others | {"OMP_NUM_THREADS": str(threads), "PEERD_CONFIG": os.devnull}
        # Several of them on one machine are a swarm of their own.
        self._environment["PEERD_NO_MDNS"] = "true"
        self._numbers = itertools.count()
        self._running: list[trio.Process] = []

    async def start(self, *arguments: str, listen: str = ANY_PORT, under: Sequence[str] = ()) -> PeerProcess:
        """Run `peerd ARGUMENTS` on loopback until it serves. Raises ProcessEnded.

        under: a command in front of it, such as `ip netns exec NAME`.
        """
        return await self._run(self._directory / f"peer-{next(self._numbers)}.key", listen, arguments, tuple(under))

    async def start_again(self, ended: PeerProcess) -> PeerProcess:
        """Run a peer that has ended once more, with the same identity at the same address. Raises ProcessEnded.

        The address is the one that it printed; this does not work for peers that announce another one.
        """
        return await self._run(ended.identity, str(ended.address.with_peer(None)), ended.arguments, ended.under)

    async def _run(
        self, identity: Path, listen: str, arguments: tuple[str, ...], under: tuple[str, ...]
    ) -> PeerProcess:
        log = identity.with_suffix(".log")
        command = [sys.executable, "-m", "peerd", "--stop-on-eof", "--listen", listen, "--identity", str(identity)]
        with log.open("ab") as log_file:
            process = await trio.lowlevel.open_process(
                [*under, *command, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                env=self._environment,
                # A Ctrl-C goes only to us, and we pass it on in our own order.
                start_new_session=True,
            )
        self._running.append(process)
        line = await _first_line(process)
        if line is None:
            await process.wait()
            raise ProcessEnded(f"a peer ended with exit code {process.returncode}: {_tail(log)}")
        return PeerProcess(process, Multiaddr.parse(line), log, identity, arguments, under)

    async def stop(self) -> None:
        """End all processes: in good order, then at once, then by force."""
        for end in (trio.Process.terminate, trio.Process.terminate, trio.Process.kill):
            for process in self._running:
                end(process)
            with trio.move_on_after(self._stop_s):
                for process in self._running:
                    await process.wait()


@asynccontextmanager
async def open_peer_processes(*, threads: int, stop_s: float = STOP_S) -> AsyncIterator[PeerProcesses]:
    """A place to start peers in, each with `threads` compute threads. All are stopped when the body ends.

    stop_s: the time between one signal and the next, harder one.
    """
    with TemporaryDirectory(prefix="peerd-") as directory:
        processes = PeerProcesses(Path(directory), threads, stop_s)
        try:
            yield processes
        finally:
            with trio.CancelScope(shield=True):
                await processes.stop()


def threads_each(processes: int) -> int:
    """How many compute threads each of `processes` gets, so that together they do not compete for the cores."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


async def _first_line(process: trio.Process) -> str | None:
    assert process.stdout is not None
    received = b""
    while b"\n" not in received:
        chunk = await process.stdout.receive_some(_READ_BYTES)
        if not chunk:
            return None
        received += chunk
    return received.split(b"\n", 1)[0].decode()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-_LOG_TAIL_CHARS:].strip()
