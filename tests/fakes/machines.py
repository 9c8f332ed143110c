"""Two connection machines back to back, and one against a peer that keeps the handshake but no other rule."""

import itertools

from peerd.protocol.connection.connection import ConnectionMachine
from peerd.protocol.connection.events import (
    StreamOpened,
)
from peerd.protocol.connection.frames import (
    Priority,
    decode_frame,
    encode_frame,
)
from peerd.protocol.connection.noise import Handshake
from peerd.protocol.identity import Identity

DIALLER, LISTENER = Identity.from_seed(b"1" * 32), Identity.from_seed(b"2" * 32)

MIB = 1024 * 1024


def seeded_random():
    """Randomness that is the same in every run."""
    counter = itertools.count(1)
    return lambda count: next(counter).to_bytes(count, "big")


class Pair:
    """A dialler `one` and a listener `other`, joined by two queues of messages that move when told."""

    def __init__(self, limits=None, **arguments):
        self.now = 1000.0
        self.one = ConnectionMachine(
            DIALLER, initiator=True, now=self.now, random_bytes=seeded_random(), limits=limits, **arguments
        )
        self.other = ConnectionMachine(
            LISTENER, initiator=False, now=self.now, random_bytes=seeded_random(), limits=limits
        )
        self.events = {self.one: [], self.other: []}
        self.sent = {self.one: 0, self.other: 0}

    def shake(self, rtt_s):
        """Handshake and first PINGs, over a line of this length."""
        for sender in (self.one, self.other, self.one):
            self.move(sender)
        pings = self.one.next_message(self.now), self.other.next_message(self.now)
        self.now += rtt_s
        self.other.receive(pings[0] or b"", self.now)
        self.one.receive(pings[1] or b"", self.now)
        self.settle()

    def move(self, sender):
        """Let one message pass. Returns whether there was one."""
        message = sender.next_message(self.now)
        self.collect(sender)
        if message is None:
            return False
        self.sent[sender] += 1
        receiver = self.other if sender is self.one else self.one
        receiver.receive(message, self.now)
        self.collect(receiver)
        return True

    def settle(self):
        """Let messages pass until neither side has any."""
        while self.move(self.one) | self.move(self.other):
            pass

    def collect(self, connection):
        while (event := connection.next_event()) is not None:
            self.events[connection].append(event)

    def of(self, connection, kind):
        return [event for event in self.events[connection] if isinstance(event, kind)]

    def open(self, priority=Priority.CONTROL):
        """A stream from `one`, as both sides see it."""
        here = self.one.streams.open("/test/1", priority)
        self.settle()
        return here, self.of(self.other, StreamOpened)[-1].stream


def bodies(connection, stream, max_body=64 * MIB):
    found = []
    while (message := connection.streams.read(stream, max_body)) is not None:
        found.append(bytes(message.body))
    return found


class Rogue:
    """Keeps the handshake, then says what it likes."""

    def __init__(self):
        self._handshake = Handshake(DIALLER, initiator=True, random_bytes=seeded_random())

    def shake(self, connection):
        connection.receive(self._handshake.write(), 1000)
        self._handshake.read(connection.next_message(1000))
        connection.receive(self._handshake.write(), 1000)
        self.sending, self.receiving = self._handshake.split()

    def say(self, connection, *frames, now=1000.0):
        for frame in frames:
            connection.receive(self.sending.encrypt(frame if isinstance(frame, bytes) else encode_frame(frame)), now)

    def read(self, message):
        return decode_frame(self.receiving.decrypt(message))

    def drain(self, connection):
        found = []
        while (message := connection.next_message(1000)) is not None:
            found.append(self.read(message))
        return found


def rogue_and_connection():
    rogue = Rogue()
    connection = ConnectionMachine(LISTENER, initiator=False, now=1000, random_bytes=seeded_random())
    rogue.shake(connection)
    return rogue, connection
