"""Moves the messages of one connection between its protocol machine and its channel, and keeps the machine's time.

`read` never sends and never waits for a handler. `write` is not cancelled when a request is. `keep_time` calls the
machine at its deadlines. `PeerConnection` runs each of them as a task, and decides how they end.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from peerd.net.connection.uplink_meter import UplinkMeter
from peerd.net.transport import MessageChannel
from peerd.protocol.connection.connection import ConnectionMachine

# How long it may take to send the last messages.
FAREWELL_S = 0.4


class Pump:
    """The reading, writing and timing of one connection. `take_events` is called when the machine may have new
    events.
    """

    def __init__(self, core: ConnectionMachine, channel: MessageChannel, take_events: Callable[[], None]) -> None:
        self.uplink = UplinkMeter()
        """How fast the line to the peer takes what we send."""
        self._core = core
        self._channel = channel
        self._take_events = take_events
        self._is_stopped = False
        self._idle = trio.lowlevel.ParkingLot()
        self._hurry = trio.lowlevel.ParkingLot()
        self._heard = trio.lowlevel.ParkingLot()
        self._writing = trio.CancelScope(shield=True)

    def wake(self) -> None:
        """Note that there may be messages to send."""
        self._idle.unpark_all()

    def hurry(self) -> None:
        """Note that the machine's deadline may be sooner than before."""
        self._hurry.unpark_all()

    def stop(self) -> None:
        """Read no more, and send what is left within FAREWELL_S."""
        self._is_stopped = True
        self._heard.unpark_all()
        self._writing.deadline = trio.current_time() + FAREWELL_S
        self.wake()

    async def read(self, wait_ready: Callable[[], Awaitable[None]]) -> None:
        """Hand messages to the machine for ever; awaits `wait_ready` after each. Raises PeerFault."""
        while True:
            message = await self._channel.receive()
            self._core.receive(message, trio.current_time())
            self._take_events()
            self.wake()
            self._heard.unpark_all()
            await wait_ready()

    async def write(self) -> None:
        """Send what the machine has to send, until it is stopped and has no more. Raises PeerFault."""
        # Shielded: only the deadline of `stop` may cut a message off in the middle.
        with self._writing:
            while True:
                message = self._core.next_message(trio.current_time())
                self._take_events()
                if message is not None:
                    began = trio.current_time()
                    await self._channel.send(message)
                    self.uplink.sent(len(message), began, trio.current_time())
                elif not self._is_stopped:
                    self.uplink.idle()
                    await self._idle.park()
                else:
                    return

    async def keep_time(self, proven: trio.Event) -> None:
        """Call the machine at its deadlines for ever: the handshake's until `proven`, then PINGs. Raises PeerFault."""
        with trio.move_on_at(self._core.deadline):
            await proven.wait()
        while True:
            self._core.check(trio.current_time(), self._channel.delivery())
            self.wake()
            with trio.move_on_at(self._core.deadline):
                await self._hurry.park()

    async def ask(self, within_s: float) -> bool:
        """Ask the peer for a sign of life. Returns whether any message of it arrives in time, before the connection
        ends.
        """
        self._core.ask(trio.current_time())
        self.wake()
        with trio.move_on_after(within_s):
            await self._heard.park()
            return not self._is_stopped
        return False

    async def measure(self) -> float | None:
        """Seconds to the peer and back, now. None if the connection ends before the peer has answered."""
        answers = self._core.answers
        self._core.ask(trio.current_time())
        self.wake()
        while self._core.answers == answers:
            if self._is_stopped:
                return None
            await self._heard.park()
        return self._core.rtt_s
