"""A real peer in a process of its own, for `tests.fuzz.attack`: real sockets, every protocol, a fake engine.

Prints its address; answers each line of its standard input with the most seconds that its event loop has computed
between two turns, and ends with its input. Strict: whatever nobody named ends it, with its stack.
"""

from __future__ import annotations

import os
import sys
import time

import trio

from peerd.peer import Peer, open_peer
from peerd.protocol.span import Span
from peerd.reach.relay_ledger import RelayLimits
from peerd.server.engine_task import EngineTask
from peerd.server.served_spans import ServedSpan
from peerd.server.server import Server
from peerd.testing.fake_engine import FakeEngine

MODEL = bytes(range(32))
BLOCKS = Span(0, 4)
WIDTH = 8
KV_TOKENS = 8192
TICK_S = 0.02
LOOK_UP_S = 0.1


class Loop:
    """How long the loop has computed at most before it looked at anything else; other programs' time is not ours."""

    def __init__(self) -> None:
        self.slowest_s = 0.0

    async def watch(self) -> None:
        while True:
            began = time.thread_time()
            await trio.sleep(TICK_S)
            self.slowest_s = max(self.slowest_s, time.thread_time() - began)


async def look_up_for_ever(peer: Peer) -> None:
    """Ask whoever is in the DHT, so that its answers can be wrong."""
    while True:
        await trio.sleep(LOOK_UP_S)
        with trio.move_on_after(5):
            await peer.discovery.directory.servers(os.urandom(32), 1, max_age_s=0.0)


async def main() -> None:
    loop = Loop()
    async with trio.open_nursery() as nursery:
        server = Server(time.time)
        await nursery.start(server.run)
        async with open_peer(listen=["/ip4/127.0.0.1/tcp/0/ws"], relay=RelayLimits()) as peer:
            peer.connections.handlers |= server.handlers
            server.attach(peer.connections)
            task = EngineTask(FakeEngine(BLOCKS, hidden_size=WIDTH, kv_tokens=KV_TOKENS))
            server.serve(ServedSpan(MODEL, 1024, task))
            nursery.start_soon(loop.watch)
            nursery.start_soon(look_up_for_ever, peer)
            print(peer.addresses[0], flush=True)
            async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as questions:
                async for _ in questions:
                    print(f"{loop.slowest_s:.3f}", flush=True)
                    loop.slowest_s = 0.0
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
