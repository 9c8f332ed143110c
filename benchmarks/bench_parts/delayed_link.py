"""A wide-area network on one machine: a TCP proxy that delays what passes, and lets only so much pass a second.

Put one before each peer, which announces the proxy's address instead of its own:

    python benchmarks/bench_parts/delayed_link.py --listen 7001 --target 7000 --rtt-ms 100 --mbit 100
    peerd --listen /ip4/127.0.0.1/tcp/7000/ws --announce /ip4/127.0.0.1/tcp/7001/ws ...

Knows bytes and time; knows nothing of what they mean. Each direction is a line: bytes leave it one after the other
at its rate, all connections together, and each arrives a fixed delay after it left. The difficulty is that the
delay must not limit throughput: what is under way is a queue with times of arrival, so reading goes on meanwhile,
held back only by the line's rate and by a receiver that does not read.
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
# How far ahead of the line we read: more than a timer's error, or the line would stand idle while we wake up.
READ_AHEAD_S = 0.005
# What may wait for a receiver that does not read, beyond what is under way.
BACKLOG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Quality:
    """What a link is like in each of its directions: `delay_s` one way, and bits a second (None: no limit)."""

    delay_s: float = 0.0
    bits_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Passed:
    """What has come out of a line: pieces, their bytes, and the seconds that they were on their way, all together."""

    pieces: int = 0
    bytes: int = 0
    seconds: float = 0.0

    @property
    def mean_s(self) -> float:
        """How long a piece was on its way; NaN where there was none."""
        return self.seconds / self.pieces if self.pieces else math.nan


class Line:
    """One direction, shared by all connections: when what enters it now has left, and has arrived.

    `passed` is what has arrived by now, with the time that it really took; set it to `Passed()` to count anew.
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
        """A piece of `size` bytes has arrived after `seconds`."""
        passed = self.passed
        self.passed = Passed(passed.pieces + 1, passed.bytes + size, passed.seconds + seconds)


class _UnderWay:
    """What one connection has on a line. Empty bytes are its end."""

    def __init__(self, line: Line) -> None:
        self._line = line
        # When each piece entered and when it arrives.
        self._queue: deque[tuple[float, float, bytes]] = deque()
        self._late_bytes = 0
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
        """The next data, once it has arrived."""
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
    """Carry all that comes from `source` over the line to `target`, and then its end."""
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
    """A proxy in front of one port. `port` is where it listens; `there` leads to who is behind it, `back` away."""

    def __init__(self, port: int, target_port: int, quality: Quality, host: str) -> None:
        self.port = port
        self._host = host
        self._target_port = target_port
        self.there = Line(quality)
        self.back = Line(quality)

    def set_quality(self, quality: Quality) -> None:
        """Be another link from now on. What is under way arrives as it would have."""
        self.there.quality = self.back.quality = quality

    async def handle(self, client: trio.SocketStream) -> None:
        """Carry one connection until both sides have ended it, or either broke it."""
        async with client:
            try:
                target = await trio.open_tcp_stream(self._host, self._target_port)
            except OSError:
                return
            async with target:
                # Small frames leave at once: the delay is ours to add.
                client.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, True)
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(pump, client, target, self.there)
                        nursery.start_soon(pump, target, client, self.back)
                except* (trio.BrokenResourceError, trio.ClosedResourceError):
                    # Somebody hung up in mid-sentence. Leaving closes both, which is what the other would see.
                    pass


@asynccontextmanager
async def open_delayed_link(
    target_port: int, quality: Quality, *, port: int = 0, host: str = "127.0.0.1"
) -> AsyncIterator[DelayedLink]:
    """A proxy to `host:target_port` while the body runs. Nobody need listen there yet."""
    async with open_tasks() as nursery:
        listeners = await trio.open_tcp_listeners(port, host=host)
        link = DelayedLink(listeners[0].socket.getsockname()[1], target_port, quality, host)
        nursery.start_soon(trio.serve_listeners, link.handle, listeners)
        yield link


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
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
