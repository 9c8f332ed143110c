"""Checks whether a peer answers at an address, without making a connection to it.

The probe uses a new identity and stops after the other side has proved its own. So it never competes with a connection
between the two peers.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from peerd.net.dial_policy import ANYWHERE, DialPolicy
from peerd.net.transport import Transport
from peerd.protocol.addresses import IpAddress, Multiaddr
from peerd.protocol.connection.noise import Handshake
from peerd.protocol.errors import PeerFault, WrongPeer
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.messages.dialback import Outcome

# The time for TCP and the websocket, and then for the handshake; together less than the deadline of a dial-back's
# answer.
CONNECT_S = 5.0
PROVE_S = 3.0


async def prove(
    transport: Transport,
    address: Multiaddr,
    peer_id: PeerId,
    swarm_key: bytes | None,
    tasks: trio.Nursery,
    policy: DialPolicy = ANYWHERE,
    on_reached: Callable[[IpAddress | None], None] = lambda _ip: None,
) -> Outcome:
    """Return whether `peer_id` answers at `address`: dial, and check its proof. Takes at most 9 s.

    on_reached: called with the IP address at which it answers.
    """
    try:
        with trio.fail_after(CONNECT_S):
            channel = await transport.dial(address, tasks, policy)
    except trio.TooSlowError:
        return "silent"
    except PeerFault as error:
        return "refused" if _was_refused(error) else "failed"
    try:
        with trio.fail_after(PROVE_S):
            handshake = Handshake(Identity.generate(), initiator=True, expected=peer_id, swarm_key=swarm_key)
            await channel.send(handshake.write())
            handshake.read(await channel.receive())
            on_reached(channel.remote_ip)
            return "reached"
    except trio.TooSlowError:
        return "silent"
    except WrongPeer:
        return "wrong_peer"
    except PeerFault:
        return "failed"
    finally:
        await channel.aclose()


def _was_refused(error: BaseException) -> bool:
    """Whether the machine there refused the connection because nothing listens on the port."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConnectionRefusedError):
        cause = cause.__cause__
    return cause is not None
