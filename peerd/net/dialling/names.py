"""Looks names up, and connects to one of the IP addresses that an address or a name stands for.

A lookup may take 20 s, in a thread that cannot be ended. So names from strangers have a few threads of their own, and
can only delay each other.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from ipaddress import ip_address

import trio

from peerd.net.dial_policy import ANYWHERE, DialPolicy
from peerd.protocol.addresses import IpAddress, Multiaddr
from peerd.protocol.errors import ConnectFailed

# How many names are looked up at the same time: those of our operator, and those from strangers.
_OWN_LOOKUPS = 4
_STRANGERS_LOOKUPS = 4
# How many IP addresses of a name are tried.
MAX_TRIED = 8
# RFC 8305, section 5.
STAGGER_S = 0.25
_FAMILIES = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}


class Names:
    """Looks up names, and applies a policy to the results."""

    def __init__(self) -> None:
        self._own = trio.CapacityLimiter(_OWN_LOOKUPS)
        self._strangers = trio.CapacityLimiter(_STRANGERS_LOOKUPS)

    async def permitted(self, address: Multiaddr, policy: DialPolicy) -> list[IpAddress]:
        """The IP addresses of `address` that the policy permits. Raises OSError, ConnectFailed."""
        ips = [address.ip] if address.ip is not None else await self._look_up(address, policy)
        found = [ip for ip in ips if policy.permits(ip)]
        if not found:
            raise ConnectFailed(f"{address.host} leads into a private network that is not ours")
        return found[:MAX_TRIED]

    async def _look_up(self, address: Multiaddr, policy: DialPolicy) -> list[IpAddress]:
        family = _FAMILIES.get(address.kind, socket.AF_UNSPEC)
        infos = await trio.to_thread.run_sync(
            lambda: socket.getaddrinfo(address.host, address.port, family=family, type=socket.SOCK_STREAM),
            abandon_on_cancel=True,
            limiter=self._own if policy is ANYWHERE else self._strangers,
        )
        return [ip_address(text) for text in dict.fromkeys(str(info[4][0]).partition("%")[0] for info in infos)]


async def connect_to_any(ips: Sequence[IpAddress], port: int) -> trio.SocketStream:
    """A TCP stream to the first that answers; each is given a moment before the next is tried. Raises OSError.

    All streams but the one that is returned are closed, also if the caller is cancelled while one of them connects.
    """
    streams: list[trio.SocketStream] = []
    errors: list[OSError] = []
    chosen: trio.SocketStream | None = None
    try:
        async with trio.open_nursery() as nursery:

            async def attempt(ip: IpAddress, failed: trio.Event) -> None:
                try:
                    streams.append(await trio.open_tcp_stream(str(ip), port))
                except OSError as error:
                    errors.append(error)
                    failed.set()
                else:
                    nursery.cancel_scope.cancel()

            for ip in ips:
                failed = trio.Event()
                nursery.start_soon(attempt, ip, failed)
                with trio.move_on_after(STAGGER_S):
                    await failed.wait()
        if not streams:
            raise errors[0]
        chosen = streams[0]
        return chosen
    finally:
        for stream in streams:
            if stream is not chosen:
                # Not `aclose`, which is a checkpoint: cancelled, it would leave the next stream open.
                stream.socket.close()
