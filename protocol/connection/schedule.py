"""Chooses which of the streams that are ready to send may send the next frame.

Strict priority, turns within one priority, and slow ageing: a stream that many frames have overtaken rises a level,
so that decodes slow a bulk transfer down but never stop it. Ageing counts frames instead of seconds, so that low
priorities get the same share of a slow line as of a fast one, and no clock is needed.
"""

from __future__ import annotations

from collections import OrderedDict

from peerd.protocol.connection.frames import Priority

# How many frames of higher priority may overtake a waiting stream before it counts as one level higher. At worst a
# decode waits for one 16 KiB frame of bulk in 64 frames of its own.
AGEING_FRAMES = 64


class Schedule:
    """The streams that are ready to send, each with the priority of the message that it would send."""

    def __init__(self) -> None:
        # For each level, stream number -> the turn at which it began to wait; the longest wait comes first.
        self._levels: dict[Priority, OrderedDict[int, int]] = {priority: OrderedDict() for priority in Priority}
        self._level_of: dict[int, Priority] = {}
        self._turn = 0

    def __len__(self) -> int:
        return len(self._level_of)

    def put(self, stream_id: int, priority: Priority) -> None:
        """Note that the stream has a message of this priority to send. A stream that already waits keeps its place."""
        current = self._level_of.get(stream_id)
        if current is priority:
            return
        if current is not None:
            del self._levels[current][stream_id]
        self._level_of[stream_id] = priority
        self._levels[priority][stream_id] = self._turn

    def remove(self, stream_id: int) -> None:
        """Note that the stream has nothing to send, or may not send."""
        level = self._level_of.pop(stream_id, None)
        if level is not None:
            del self._levels[level][stream_id]

    def take(self) -> int | None:
        """The stream that may send now, removed from the schedule; None if none is ready. `put` it back to send
        again.
        """
        best: tuple[int, int, int] | None = None
        for priority, waiting in self._levels.items():
            if waiting:
                stream_id, since = next(iter(waiting.items()))
                rank = (priority - (self._turn - since) // AGEING_FRAMES, since, stream_id)
                best = rank if best is None else min(best, rank)
        if best is None:
            return None
        self._turn += 1
        self.remove(best[2])
        return best[2]
