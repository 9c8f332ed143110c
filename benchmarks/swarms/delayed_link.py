"""Simulates a wide-area network on one machine: a TCP proxy that delays bytes and limits their rate.

Put a proxy before each peer, and let the peer announce the proxy's address instead of its own:

    python -m benchmarks.swarms.delayed_link --listen 7001 --target 7000 --rtt-ms 100 --mbit 100
    peerd --listen /ip4/127.0.0.1/tcp/7000/ws --announce /ip4/127.0.0.1/tcp/7001/ws ...

Each direction is a line that all connections share. Bytes leave the line one after another at its rate, and each
arrives a fixed delay after it left. The delay must not limit throughput, so bytes under way wait in a queue with their
times of arrival, and the proxy goes on reading. Only the line's rate, and a receiver that does not read, hold it back.
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from peerd.trio_tools import open_tasks

CHUNK_BYTES = 16 * 1024
# How far ahead of the line we read. It is more than a timer's error, so the line does not stand idle while we wake up.
READ_AHEAD_S = 0.005
# How many bytes may wait for a receiver that does not read, beyond those under way.
BACKLOG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Quality:
    """A link's quality in each of its directions: `delay_s` one way, and bits a second (None: no limit)."""

    delay_s: float = 0.0
    bits_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Passed:
    """What has come out of a line: the number of pieces, their bytes, and the sum of the seconds that they were under
    way.
    """

    pieces: int = 0
    bytes: int = 0
    seconds: float = 0.0

    @property
    def mean_s(self) -> float:
        """How long a piece was under way on average; NaN without pieces."""
        return self.seconds / self.pieces if self.pieces else math.nan


class Line:
    """One direction, which all connections share. It computes when bytes that enter now leave, and when they arrive.

    `passed` counts what has arrived so far, with the time that it really took. Set it to `Passed()` to count anew.
    """

    def __init__(self, quality: Quality) -> None:
        self.quality = quality
        self.free_at = 0.0
        self.passed = Passed()

    def enter(self, size: int, now: float) -> float:
        """Put `size` bytes on the line behind all others. Returns when the last of them arrives."""
        self.free_at = max(self.free_at, now)
        if self.quality.bits_per_s is not None:
            self.free_at += size * 8 / self.quality.bits_per_s
        return self.free_at + self.quality.delay_s

    def leave(self, size: int, seconds: float) -> None:
        """Count a piece of `size` bytes that has arrived after `seconds`."""
        passed = self.passed
        self.passed = Passed(passed.pieces + 1, passed.bytes + size, passed.seconds + seconds)


class _UnderWay:
    """The bytes of one connection on a line. Empty bytes mark its end."""

    def __init__(self, line: Line) -> None:
        self._line = line
        # For each piece: when it entered, when it arrives, and its bytes.
        self._queue: deque[tuple[float, float, bytes]] = deque()
        self._moved = trio.lowlevel.ParkingLot()

    async def put(self, data: bytes) -> None:
        """Take data, then wait until the line can take more and the receiver is not too far behind."""
        now = trio.current_time()
        self._queue.append((now, self._line.enter(len(data), now), data))
        self._moved.unpark_all()
        await trio.sleep_until(self._line.free_at - READ_AHEAD_S)
        while self._arrived_bytes() > BACKLOG_BYTES:
            await self._moved.park()

    async def take(self) -> bytes:
        """Return the next data once it has arrived."""
        while not self._queue:
            await self._moved.park()
        await trio.sleep_until(self._queue[0][1])
        entered, _, data = self._queue.popleft()
        self._line.leave(len(data), trio.current_time() - entered)
        self._moved.unpark_all()
        return data

    def _arrived_bytes(self) -> int:
        now = trio.current_time()
        total = 0
        for _, arrives, data in self._queue:
            if arrives > now:
                break
            total += len(data)
        return total


async def pump(source: trio.abc.ReceiveStream, target: trio.abc.HalfCloseableStream, line: Line) -> None:
    """Carry all bytes from `source` over the line to `target`, and then the end of the stream."""
    under_way = _UnderWay(line)

    async def read() -> None:
        while True:
            data = await source.receive_some(CHUNK_BYTES)
            await under_way.put(bytes(data))
            if not data:
                return

    async def write() -> None:
        while data := await under_way.take():
            await target.send_all(data)
        await target.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        nursery.start_soon(write)


class DelayedLink:
    """A proxy in front of one port. It listens on `port`. The line `there` leads to the target, `back` from it."""

    def __init__(self, port: int, target_port: int, quality: Quality, host: str) -> None:
        self.port = port
        self._host = host
        self._target_port = target_port
        self.there = Line(quality)
        self.back = Line(quality)

    def set_quality(self, quality: Quality) -> None:
        """Change the link's quality. Bytes under way arrive as they would have."""
        self.there.quality = self.back.quality = quality

    async def handle(self, client: trio.SocketStream) -> None:
        """Carry one connection until both sides have ended it, or one of them broke it."""
        async with client:
            try:
                target = await trio.open_tcp_stream(self._host, self._target_port)
            except OSError:
                return
            async with target:
                # Small frames leave at once, so that the delay is only the one that we add.
                client.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, True)
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(pump, client, target, self.there)
                        nursery.start_soon(pump, target, client, self.back)
                except* (trio.BrokenResourceError, trio.ClosedResourceError):
                    # One side hung up in the middle. Closing both connections shows this to the other side.
                    pass


@asynccontextmanager
async def open_delayed_link(
    target_port: int, quality: Quality, *, port: int = 0, host: str = "127.0.0.1"
) -> AsyncIterator[DelayedLink]:
    """Open a proxy to `host:target_port` for the block. The target need not listen yet."""
    async with open_tasks() as nursery:
        listeners = await trio.open_tcp_listeners(port, host=host)
        link = DelayedLink(listeners[0].socket.getsockname()[1], target_port, quality, host)
        nursery.start_soon(trio.serve_listeners, link.handle, listeners)
        yield link


def free_port(host: str = "127.0.0.1") -> int:
    """Find a port on which no program listens now."""
    import socket

    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


async def _run(listen: int, target: int, quality: Quality) -> None:
    async with open_delayed_link(target, quality, port=listen) as link:
        print(f"127.0.0.1:{link.port} -> 127.0.0.1:{target}", flush=True)
        await trio.sleep_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listen", type=int, default=0, metavar="PORT", help="default: any free one")
    parser.add_argument("--target", type=int, required=True, metavar="PORT")
    parser.add_argument("--rtt-ms", type=float, default=0.0, help="both ways together; half of it each way")
    parser.add_argument("--mbit", type=float, help="megabits a second in each direction; default: no limit")
    chosen = parser.parse_args()
    quality = Quality(chosen.rtt_ms / 2000, chosen.mbit * 1e6 if chosen.mbit else None)
    try:
        trio.run(_run, chosen.listen, chosen.target, quality)
    except* KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
