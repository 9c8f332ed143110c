"""Serves training passes: admits lanes, finds the span that each asks for, and tells a client why its lane ended.

`lane.py` runs a lane, which is one stream of one client.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from peerd.exchange.first_message import first_message
from peerd.exchange.refusals import refuse
from peerd.net.connections import Stream
from peerd.net.limits.owners import Owner, Tally
from peerd.protocol.encoding.tensors import CODECS
from peerd.protocol.errors import (
    BadResult,
    Draining,
    InternalError,
    Overloaded,
    PeerdError,
    PeerFault,
    RemoteProtocolError,
    UnsupportedFeature,
)
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.training import PASS_FEATURES, Begin, PassFailure
from peerd.server.engine_task import EngineTask
from peerd.server.quotas import HOST_BYTES, HostQuota
from peerd.server.training.lane import Lane, PassSpan

# A client trains through one lane a hop; this is enough for a few models and spans at once.
MAX_LANES_A_PEER = 16
MAX_LANES_A_NETWORK = 64
# Each lane costs a few tasks, whatever it holds.
MAX_LANES = 256
# The hint for a client that found no room: passes take seconds.
RETRY_MS = 1000

Find = Callable[[PeerId, Begin], PassSpan]
"""The span that a peer's lane asks for. Raises NotServed, Draining, UnsupportedFeature."""


class PassServer:
    """Answers lanes: `handle` goes to the connections."""

    def __init__(self, find: Find) -> None:
        self._find = find
        self._quota = HostQuota(HOST_BYTES)
        self._lanes = Tally()
        self._running: dict[Lane, trio.CancelScope] = {}
        self._lane_ended = trio.lowlevel.ParkingLot()

    @property
    def lanes(self) -> int:
        """How many lanes are open."""
        return self._lanes.total

    @property
    def held_bytes(self) -> int:
        """The bytes that lanes hold in parameters and requests."""
        return self._quota.held_bytes

    async def end_lanes(self, task: EngineTask, *, spared: PeerId | None = None) -> None:
        """End the lanes over a span that leaves; their clients find other peers. Waits for the turn that is running.

        spared: the client whose lanes go on, if any.
        """
        while scopes := [
            scope for lane, scope in self._running.items() if lane.task is task and lane.owner.peer_id != spared
        ]:
            for scope in scopes:
                scope.cancel()
            await self._lane_ended.park()

    async def handle(self, stream: Stream) -> None:
        """Serve one lane, from its `begin` to its end."""
        owner = Owner.at(stream.peer, stream.connection.accountable_ip)
        try:
            has_share = self._lanes.has_room(owner, 1, a_peer=MAX_LANES_A_PEER, a_network=MAX_LANES_A_NETWORK)
            if not has_share or self._lanes.total >= MAX_LANES:
                raise Overloaded(
                    f"{self._lanes.of_peer(owner)} lanes of yours and {self._lanes.total} of all are open here already"
                )
            self._lanes.add(owner, 1)
            try:
                await self._serve(stream, owner)
            finally:
                self._lanes.add(owner, -1)
        except (trio.EndOfChannel, trio.ClosedResourceError):
            # The client has finished with the lane.
            stream.reset("closed")
        except PeerFault as error:
            if isinstance(error, RemoteProtocolError | BadResult | InternalError):
                await refuse(stream, _failure, error)
        except PeerdError as error:
            await refuse(stream, _failure, error)

    async def _serve(self, stream: Stream, owner: Owner) -> None:
        begin = await first_message(stream, (Begin,))
        found = self._find(owner.peer_id, begin)
        if missing := sorted(set(begin.needs) - PASS_FEATURES):
            raise UnsupportedFeature(f"this peer lacks {', '.join(missing)} in training")
        if begin.codec not in CODECS:
            raise UnsupportedFeature(f"codec {begin.codec!r} is not one of {', '.join(sorted(CODECS))}")
        lane = Lane(stream, owner, begin, found, self._quota)
        with trio.CancelScope() as scope:
            self._running[lane] = scope
            try:
                await lane.run()
            finally:
                del self._running[lane]
                lane.drop_all()
                self._lane_ended.unpark_all()
        if scope.cancelled_caught:
            raise Draining("this peer no longer serves these blocks")


def _failure(error: PeerdError) -> PassFailure:
    """The error as it travels on a lane, with a hint when to ask again."""
    retry_ms = max(RETRY_MS, round(1000 * error.retry_after_s)) if isinstance(error, Overloaded) else 0
    return PassFailure.of(error, retry_ms)
