"""Finds the address and port at which others see the port from which we dial, and whether all see the same one.

A NAT may give one port inside the same port outside for all destinations, which then all see it there; or a new one for
each destination (a "symmetric" NAT, address-dependent mapping in RFC 4787), which no peer can tell another. Two
witnesses at different addresses show which it is. One of them may lie, so a NAT is called symmetric only if a third, in
another network, sees it at yet another place. The result is remembered, since a NAT does not change.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import trio

from peerd.net.connections import Connections, PeerConnection
from peerd.protocol.addresses import IpAddress, Multiaddr, public_network
from peerd.protocol.errors import ConnectFailed, PeerFault, UnsupportedFeature

# How long it is remembered whether the NAT behind an address is symmetric: a network may get another router.
REMEMBERED_S = 3600.0
MAX_REMEMBERED = 16
# How many witnesses beside the relay say that a NAT is symmetric: one alone may lie.
WITNESSES = 2


class _Sight:
    """What one peer says of our own port, and how many callers need it now."""

    def __init__(self) -> None:
        self.at: Multiaddr | None = None
        self.why = "a bug of ours"
        self.users = 0
        self.known = trio.Event()
        self.unused = trio.Event()


class OwnEndpoint:
    """Asks the peers that we dialled where they see us. One task must `run`."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        # By our address outside: whether its NAT is symmetric, and when we saw that.
        self._symmetric: dict[IpAddress, tuple[bool, float]] = {}
        self._sights: dict[Multiaddr, _Sight] = {}
        self._nursery: trio.Nursery | None = None

    def __repr__(self) -> str:
        return f"<OwnEndpoint {self._symmetric}>"

    async def run(self) -> None:
        """Hold the connections of `seen_by`, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await trio.sleep_forever()
            finally:
                # A handler may still run, which must not start a task in a nursery that has ended.
                self._nursery = None

    @asynccontextmanager
    async def seen_by(self, relay: PeerConnection) -> AsyncIterator[Multiaddr]:
        """Yield where a relay that we dialled sees our own port, and keep the port open in a NAT during the block.

        Raises ConnectFailed if the relay cannot be asked, and UnsupportedFeature if it is of no use to others, because
        our NAT is symmetric.
        """
        if relay.hello is not None and relay.hello.seen_at is not None and self._is_symmetric(relay.hello.seen_at):
            raise UnsupportedFeature("our NAT gives each destination another port")
        async with AsyncExitStack() as stack:
            at = await stack.enter_async_context(self._shared(self._address_of(relay)))
            outside = at.ip
            assert outside is not None
            if self._is_symmetric(outside) is None:
                with suppress(PeerFault):
                    at = await self._compare(stack, relay, at)
            if self._is_symmetric(outside):
                raise UnsupportedFeature("our NAT gives each destination another port")
            yield at

    async def _compare(self, stack: AsyncExitStack, relay: PeerConnection, at: Multiaddr) -> Multiaddr:
        """Where our port is seen, which a relay says is `at`: ask others, and note what follows if two agree or all
        differ. Raises a PeerFault if a witness cannot be asked.
        """
        assert at.ip is not None
        seen = [at]
        for witness in self._other_witnesses(relay)[:WITNESSES]:
            also = await stack.enter_async_context(self._shared(witness))
            if also in seen:
                self._note(at.ip, symmetric=False)
                return also
            seen.append(also)
        if len(seen) == 1 + WITNESSES:
            self._note(at.ip, symmetric=True)
        return at

    @asynccontextmanager
    async def _shared(self, address: Multiaddr) -> AsyncIterator[Multiaddr]:
        """Where the peer at an address sees our own port. From one port there can be only one connection to it, which
        all callers share.
        """
        sight = self._sights.get(address)
        if sight is None:
            if self._nursery is None:
                raise ConnectFailed("nothing holds connections from our own port")
            sight = self._sights[address] = _Sight()
            self._nursery.start_soon(self._hold, address, sight)
        sight.users += 1
        try:
            await sight.known.wait()
            if sight.at is None:
                raise ConnectFailed(sight.why)
            yield sight.at
        finally:
            sight.users -= 1
            if not sight.users:
                self._sights.pop(address, None)
                sight.unused.set()

    async def _hold(self, address: Multiaddr, sight: _Sight) -> None:
        try:
            with self._connections.containment.around("learning where others see us", address.peer_id):
                try:
                    async with self._connections.meetings.seen_by(address) as sight.at:
                        sight.known.set()
                        await sight.unused.wait()
                except ConnectFailed as error:
                    sight.why = str(error)
        finally:
            sight.known.set()

    def _is_symmetric(self, outside: IpAddress) -> bool | None:
        """Whether the NAT at this address is symmetric; None if we do not know."""
        found = self._symmetric.get(outside)
        return None if found is None or found[1] + REMEMBERED_S < trio.current_time() else found[0]

    def _note(self, outside: IpAddress, *, symmetric: bool) -> None:
        self._symmetric.pop(outside, None)
        self._symmetric[outside] = (symmetric, trio.current_time())
        if len(self._symmetric) > MAX_REMEMBERED:
            del self._symmetric[next(iter(self._symmetric))]

    def _address_of(self, peer: PeerConnection) -> Multiaddr:
        """The address at which we dialled a peer. Raises ConnectFailed if it cannot be dialled from our own port."""
        for address in self._connections.sightings.addresses_of(peer.peer_id):
            if address.ip is not None and address.ip == peer.remote_ip and not address.secure:
                return address.with_peer(peer.peer_id)
        raise ConnectFailed(f"there is no plain address of the relay {peer.peer_id} at which it could see our port")

    def _other_witnesses(self, relay: PeerConnection) -> list[Multiaddr]:
        """Other peers that we dialled, on the same side of our NAT as the relay, each in another network."""
        found: dict[str, Multiaddr] = {}
        for peer in self._connections.live.values():
            if peer.remote_ip is None or not peer.dialled or peer.punched or not self._is_alike(peer, relay):
                continue
            place = _place_of(peer)
            if place != _place_of(relay) and place not in found:
                with suppress(ConnectFailed):
                    found[place] = self._address_of(peer)
        return list(found.values())

    @staticmethod
    def _is_alike(one: PeerConnection, other: PeerConnection) -> bool:
        """Whether both are on the internet, or neither is, with addresses of one version."""
        first, second = one.remote_ip, other.remote_ip
        assert first is not None
        assert second is not None
        return first.version == second.version and (public_network(first) is None) == (public_network(second) is None)


def _place_of(peer: PeerConnection) -> str:
    """A peer's public network, or its address in a private one."""
    return public_network(peer.remote_ip) or str(peer.remote_ip)
