"""What the system knows of a TCP connection: the other side's address, and what became of the bytes that we sent."""

from __future__ import annotations

import struct
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address

import trio

from peerd.protocol.connection.liveness import Delivery

# tcpi_retransmits and tcpi_probes, counted since the last acknowledgement; tcpi_bytes_acked (Linux 4.1).
_FIELDS = struct.Struct("@2xBB116xQ")


def remote(stream: trio.abc.Stream) -> tuple[IPv4Address | IPv6Address | None, int]:
    """The address and port at the other end; None and 0 if it is not TCP. Raises OSError if the other side has reset it
    already.
    """
    inner = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    if not isinstance(inner, trio.SocketStream):
        return None, 0
    host, port, *_ = inner.socket.getpeername()
    ip = ip_address(host.partition("%")[0])
    return (ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip), port


def delivery_of(socket: trio.socket.SocketType) -> Delivery | None:
    """What happened to the bytes sent on a TCP socket; None if the system does not say, or the socket is closed."""
    if sys.platform != "linux":
        return None
    try:
        info = socket.getsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_INFO, _FIELDS.size)
    except OSError:
        return None
    if len(info) < _FIELDS.size:
        return None
    retransmits, probes, acknowledged_bytes = _FIELDS.unpack(info)
    return Delivery(acknowledged_bytes, max(retransmits, probes))
