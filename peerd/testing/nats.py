"""NATs of a network in memory: which port outside a port inside gets, and which packets are let in.

The names are those of RFC 4787. All kinds let in only what comes from an address and port to which something was sent
("address and port-dependent filtering"), which most routers do.
"""

from __future__ import annotations

from typing import Literal

NatKind = Literal["port_preserving", "endpoint_independent", "symmetric"]
"""port_preserving: the port outside is the one inside. endpoint_independent: it is another one, the same for all
destinations. symmetric: it is another one for each destination.
"""

Endpoint = tuple[str, int]
"""A host and a port."""
_FIRST_PORT = 20_000


class Nat:
    """One NAT at the address `outside`."""

    def __init__(self, outside: str, kind: NatKind) -> None:
        self.outside = outside
        self._kind = kind
        # The port outside for a port inside, and for a destination where that matters.
        self._ports: dict[tuple[Endpoint, Endpoint | None], int] = {}
        self._hosts: dict[int, Endpoint] = {}
        self._open: set[tuple[int, Endpoint]] = set()
        self._next_port = _FIRST_PORT

    def __repr__(self) -> str:
        return f"<Nat {self.outside} {self._kind} ports={len(self._hosts)}>"

    def out(self, inside: Endpoint, destination: Endpoint) -> int:
        """The port outside of a packet to a destination, whose answers are let in from now on."""
        key = (inside, destination if self._kind == "symmetric" else None)
        if key not in self._ports:
            port = inside[1]
            if self._kind != "port_preserving" or port in self._hosts:
                port, self._next_port = self._next_port, self._next_port + 1
            self._ports[key] = port
            self._hosts[port] = inside
        port = self._ports[key]
        self._open.add((port, destination))
        return port

    def into(self, port: int, sender: Endpoint) -> Endpoint | None:
        """The host and port inside that get a packet to this port outside; None if it is dropped."""
        return self._hosts.get(port) if (port, sender) in self._open else None


class Nats:
    """The NATs of a network, and the hosts behind them."""

    def __init__(self) -> None:
        self._by_host: dict[str, Nat] = {}
        self._forwards: dict[Endpoint, Endpoint] = {}

    def __repr__(self) -> str:
        return f"<Nats of {len(self._by_host)} hosts>"

    def put(self, host: str, outside: str, kind: NatKind) -> None:
        """Put a host behind the NAT at this address, which is made if there is none yet."""
        there = [nat for nat in self._by_host.values() if nat.outside == outside]
        self._by_host[host] = there[0] if there else Nat(outside, kind)

    def forward(self, outside: str, port: int, host: str) -> None:
        """Forward dials to a NAT's port to the same port of a host behind it."""
        self._forwards[outside, port] = (host, port)

    def forwarded(self, host: str, port: int) -> Endpoint:
        """Where a dial to an address ends."""
        return self._forwards.get((host, port), (host, port))

    def swallow(self, host: str, remote_host: str, port: int) -> bool:
        """Whether a NAT drops dials to this address without an answer."""
        inside = self._by_host.get(remote_host)
        if inside is not None and inside is not self._by_host.get(host):
            return True
        is_nat = any(nat.outside == remote_host for nat in self._by_host.values())
        return is_nat and (remote_host, port) not in self._forwards

    def outside(self, inside: Endpoint, destination: Endpoint) -> Endpoint:
        """Where the destination sees a packet from a port of a host; the NAT in front of the host lets answers in."""
        nat = self._by_host.get(inside[0])
        if nat is None or nat is self._by_host.get(destination[0]):
            return inside
        return nat.outside, nat.out(inside, destination)

    def inside(self, destination: Endpoint, sender: Endpoint) -> Endpoint | None:
        """The host and port that get what `sender` sends to an address; None if a NAT drops it."""
        for nat in self._by_host.values():
            if nat.outside == destination[0]:
                return nat.into(destination[1], sender)
        return None if destination[0] in self._by_host else destination
