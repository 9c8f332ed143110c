"""Two peers on the loopback of a network namespace of their own, whose packets vanish from one moment on.

Run it as a program, as root of a new user and network namespace. It prints, as JSON, how many seconds each side took to
lose the other and why; first for a connection in use whose process stood still for 4 s before.
"""

from __future__ import annotations

import json
import time
from contextlib import AbstractAsyncContextManager

import trio

from peerd.net.connections import Connections, open_connections
from peerd.net.stream import Stream
from peerd.net.websockets.transport import WebSocketTransport
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import Identity

LISTEN = Multiaddr.parse("/ip4/127.0.0.1/tcp/0/ws")
STALL_S = 4.0


async def sink(_stream: Stream) -> None:
    await trio.sleep_forever()


def one(seed: int, *listen: Multiaddr) -> AbstractAsyncContextManager[Connections]:
    return open_connections(
        Identity.from_seed(bytes([seed]) * 32),
        transport=WebSocketTransport(),
        listen=listen,
        handlers={"/sink/1": sink},
    )


async def lost_after(connections: Connections, start: float, found: list[tuple[float, str]]) -> None:
    (connection,) = connections.live.values()
    error = await connection.wait_lost()
    found.append((trio.current_time() - start, str(error)))


async def main() -> None:
    await trio.run_process(["ip", "link", "set", "lo", "up"])
    async with one(1) as near, one(2, LISTEN) as far:
        await near.open_stream(far.peer_id, "/sink/1", addresses=far.listen_addresses)
        await trio.sleep(0.2)
        # Both stand still: each is held up itself, and sees a silent peer whose system is there.
        time.sleep(STALL_S)  # noqa: ASYNC251  it is to block the loop
        await trio.sleep(2)
        survived = len(near.live) == len(far.live) == 1
        await trio.run_process(["iptables", "-A", "INPUT", "-i", "lo", "-j", "DROP"])
        found: list[tuple[float, str]] = []
        with trio.move_on_after(15):
            async with trio.open_nursery() as nursery:
                for side in (near, far):
                    nursery.start_soon(lost_after, side, trio.current_time(), found)
        print(json.dumps({"survived": survived, "lost": found}), flush=True)


if __name__ == "__main__":
    trio.run(main)
