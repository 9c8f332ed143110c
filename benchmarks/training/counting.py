"""A transport that counts what a client's connections carry, for benchmarks."""

from __future__ import annotations

from typing import Any

import trio

from peerd.net.dial_policy import ANYWHERE, DialPolicy
from peerd.net.websockets.channel import WebSocketChannel
from peerd.net.websockets.transport import WebSocketTransport
from peerd.protocol.addresses import Multiaddr


class CountingTransport(WebSocketTransport):
    """Counts the bytes of messages on connections that it dialled, both ways: encrypted, without TCP's own."""

    def __init__(self) -> None:
        super().__init__()
        self.carried = 0

    async def dial(self, address: Multiaddr, tasks: trio.Nursery, policy: DialPolicy = ANYWHERE) -> WebSocketChannel:
        channel: Any = await super().dial(address, tasks, policy)
        send, receive = channel.send, channel.receive

        async def counted_send(message: bytes) -> None:
            self.carried += len(message)
            await send(message)

        async def counted_receive() -> bytes:
            message: bytes = await receive()
            self.carried += len(message)
            return message

        channel.send, channel.receive = counted_send, counted_receive
        counted: WebSocketChannel = channel
        return counted
