"""A program: a cable between two interfaces of one namespace that takes a while, for systems without netem.

    delaying_wire.py MILLISECONDS INTERFACE INTERFACE

Each frame that comes in at one interface leaves at the other one that much later. Frames travel with the kernel's own
header (packet(7), PACKET_VNET_HDR): it says which checksums and segments the kernel has not made yet, so they need not
be made here.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections import deque

_PACKET_VNET_HDR = 15
_SOL_PACKET = 263
_ALL_PROTOCOLS = 3
# A frame with several segments, and the kernel's header.
_MAX_BYTES = 1 << 17


def opened(interface: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
    end.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    end.bind((interface, 0))
    return end


def run(delay_s: float, interfaces: tuple[str, str]) -> None:
    """Pass frames on for ever."""
    one, other = map(opened, interfaces)
    opposite = {one: other, other: one}
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()
    while True:
        timeout_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for end in select.select([one, other], [], [], timeout_s)[0]:
            frame, address = end.recvfrom(_MAX_BYTES)
            if address[2] != socket.PACKET_OUTGOING:
                waiting.append((time.monotonic() + delay_s, opposite[end], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, end, frame = waiting.popleft()
            end.send(frame)


if __name__ == "__main__":
    run(float(sys.argv[1]) / 1000, (sys.argv[2], sys.argv[3]))
