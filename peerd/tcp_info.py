"""What the system's TCP knows of what a socket sent: Linux tells, others do not.

Knows `struct tcp_info` (linux/tcp.h) and no connection. Of it two things matter: whether bytes arrive at the far
system, and how often in a row ours tried in vain, be it to send or, with a closed window, to ask for room.
"""

from __future__ import annotations

import struct
import sys

import trio

from peerd.protocol.connection.liveness import Delivery

# tcpi_retransmits and tcpi_probes, counted since the last acknowledgement; tcpi_bytes_acked (Linux 4.1).
_FIELDS = struct.Struct("@2xBB116xQ")


def delivery_of(socket: trio.socket.SocketType) -> Delivery | None:
    """What became of what was sent on a TCP socket; None where the system does not say, or it is closed."""
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
