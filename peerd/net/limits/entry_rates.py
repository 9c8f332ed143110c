"""Limits how often peers may make us work for nothing: shake hands, and open streams.

A handshake costs us 2.5 ms and a stream that is opened and reset 0.48 ms, whatever the peer gains. The limits of one
connection did not stop a peer that dials again, or that has many keys. So these limits hold for a PeerId and for a
public network, over all their connections. A refusal costs the peer its connection or stream, and us less than what
it asked for.
"""

from __future__ import annotations

from typing import Final

from peerd.net.limits.gate import host_of
from peerd.net.limits.owners import Owner, network_of
from peerd.net.limits.rates import NamedRates, Rates
from peerd.protocol.addresses import IpAddress
from peerd.protocol.identity import PeerId

# One honest peer dials us once at a time. It tries our addresses one after the other, of which the DHT names 4
# (`routing/dht/messages.py`), looks for us once at each of them (`Dht.meet_newcomers`), and while nobody answers it
# tries again after 1 s, 2 s and so on (`discovery/joining.py`). Its clients' measuring rounds dial at most once in 24 s
# (`client/finding/scout.py`). So it needs 8 handshakes at once and less than one a second. Behind one address
# (an IPv6 /64), 16 peers may start at once; 128 handshakes cost a third of a second.
HANDSHAKES_A_SECOND: Final = 8.0
HANDSHAKES_AT_ONCE: Final = 128
# A network has as much as 4 of its addresses: at most 8 % of one processor in the long run.
_NETWORK_HANDSHAKES: Final = 4
# What one key may cost that comes from many networks, which before its proof cannot be told apart.
SETTLED_A_SECOND: Final = 2.0
SETTLED_AT_ONCE: Final = 32
# spec/connection/connection.md allows each connection this much, so no honest peer opens streams faster. A public
# network gets no more than one connection: a quarter of one processor. Its 64 peers could still look up eight keys a
# second each.
OPENS_A_SECOND: Final = 512.0
OPENS_AT_ONCE: Final = 1024
# Refusing costs work too, so a connection on which so many streams were refused is closed. They are forgotten after a
# second with no more streams than an honest peer opens at most (115, see `question_rates`): its neighbours may use up
# the rate of its network.
MAX_REFUSED_OPENS: Final = 256
HONEST_OPENS_A_SECOND: Final = 128


class EntryRates:
    """The rates of one process. Every method returns whether the peer may do it now; if so, it is counted."""

    def __init__(self) -> None:
        self._by_host = NamedRates(HANDSHAKES_A_SECOND, HANDSHAKES_AT_ONCE)
        self._by_network = NamedRates(
            HANDSHAKES_A_SECOND * _NETWORK_HANDSHAKES, HANDSHAKES_AT_ONCE * _NETWORK_HANDSHAKES
        )
        self._settled = NamedRates(SETTLED_A_SECOND, SETTLED_AT_ONCE)
        self._opens = Rates(OPENS_A_SECOND, OPENS_AT_ONCE)

    def may_shake_hands(self, ip: IpAddress | None, now: float) -> bool:
        """For a connection whose peer is not known yet. Private and unknown addresses are not counted."""
        host, network = host_of(ip), network_of(ip)
        return not host or (self._by_host.may(host, now) and self._by_network.may(network, now))

    def may_settle(self, peer_id: PeerId, now: float) -> bool:
        """For a peer that dialled us and has just proved its PeerId."""
        return self._settled.may(peer_id, now)

    def may_open(self, owner: Owner, now: float) -> bool:
        """For a stream that the peer opens."""
        return self._opens.may(owner, now)


class RefusedOpens:
    """Counts the streams of one connection that were refused, to tell a flood from a peer with flooding neighbours."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._opened = 0
        self._refused = 0

    def opened(self, now: float) -> None:
        """Note a stream that the peer opens, before it is refused or not."""
        if now - self._since >= 1:
            if self._opened <= HONEST_OPENS_A_SECOND:
                self._refused = 0
            self._since, self._opened = now, 0
        self._opened += 1

    def refused(self) -> bool:
        """Note that it was refused. Returns whether that was one too many."""
        self._refused += 1
        return self._refused > MAX_REFUSED_OPENS
