"""What we say about ourselves in the hello of each new connection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from peerd.net.connection.peer_connection import PeerConnection
from peerd.net.handlers import StreamHandler
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.hello import MAX_ITEMS, Hello


@dataclass(eq=False)
class Introduction:
    """The facts of our hellos, which may change while we run.

    agent: our program's name and version. now: the time in seconds since 1970. handlers: the protocols that we serve.
    roles: what we offer to others. listen_as: where others may dial us.
    """

    agent: str
    now: Callable[[], float]
    handlers: Mapping[str, StreamHandler]
    roles: Sequence[str] = ()
    listen_as: Sequence[Multiaddr] = ()

    def hello_to(self, connection: PeerConnection) -> Hello:
        """Our hello for the peer at the other end, which also says at which address and port we see that peer."""
        return Hello(
            agent=self.agent,
            time_us=int(self.now() * 1e6),
            protocols=tuple(sorted(self.handlers))[:MAX_ITEMS],
            addresses=tuple(map(str, self.listen_as))[:MAX_ITEMS],
            observed_ip=str(connection.remote_ip or ""),
            roles=tuple(self.roles)[:MAX_ITEMS],
            observed_port=connection.remote_port,
        )
