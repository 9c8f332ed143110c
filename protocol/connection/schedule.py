"""Whose turn it is: of the streams that could send a frame now, the one whose frame should go next.

Knows streams by number and the priority of their head messages; knows no bytes. Strict priority, turns
within one, and slow ageing: a stream that has been passed over by enough frames rises a level, so that a
stream of decodes slows a bulk transfer down but never stops it. Counting frames and not seconds gives the
low priorities the same share of a slow link as of a fast one, and needs no clock.
"""

from __future__ import annotations

from collections import OrderedDict

from peerd.protocol.connection.frames import Priority

# Frames of higher priority that pass a waiting stream before it counts as one level higher. At worst a
# decode waits for one 16 KiB frame of bulk in 64 of its own.
AGEING_FRAMES = 64


class Schedule:
    """The streams that are ready to send, each with the priority of what it would send."""

    def __init__(self) -> None:
        # In each level, who has waited longest comes first: number -> the turn at which it began to wait.
        self._levels: dict[Priority, OrderedDict[int, int]] = {priority: OrderedDict() for priority in Priority}
        self._level_of: dict[int, Priority] = {}
        self._turn = 0

    def __len__(self) -> int:
        return len(self._level_of)

    def put(self, stream_id: int, priority: Priority) -> None:
        """The stream is ready to send something of this priority. One that waits already keeps its place."""
        current = self._level_of.get(stream_id)
        if current is priority:
            return
        if current is not None:
            del self._levels[current][stream_id]
        self._level_of[stream_id] = priority
        self._levels[priority][stream_id] = self._turn

    def remove(self, stream_id: int) -> None:
        """The stream has nothing to send, or may not."""
        level = self._level_of.pop(stream_id, None)
        if level is not None:
            del self._levels[level][stream_id]

    def take(self) -> int | None:
        """The stream whose turn it is; it must be put again to get another. None if none is ready."""
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
