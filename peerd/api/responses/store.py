"""Keeps finished responses for an hour, in memory, so that a later request can go on from one.

Nothing is written to disk. The oldest make room for new ones, by number and by memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

KEPT_S = 3600.0
MOST_RESPONSES = 1024
MOST_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Stored:
    """A response. `messages`: the conversation up to its end, without instructions, in the words of chats.

    Responses of one conversation share their messages; `size_bytes` counts them all the same, since any of the
    responses may be the last one that holds them.
    """

    body: dict[str, Any]
    messages: tuple[dict[str, Any], ...]
    size_bytes: int
    until: float


class ResponseStore:
    """The responses that are kept now, by id."""

    def __init__(
        self, clock: Callable[[], float], most_responses: int = MOST_RESPONSES, most_bytes: int = MOST_BYTES
    ) -> None:
        self._clock = clock
        self._most_responses = most_responses
        self._most_bytes = most_bytes
        self._kept: dict[str, Stored] = {}
        # The response to which each item of output belongs.
        self._items: dict[str, str] = {}
        self._size_bytes = 0

    def __repr__(self) -> str:
        return f"<ResponseStore {len(self._kept)} responses, {self._size_bytes} bytes>"

    def keep(self, body: dict[str, Any], messages: tuple[dict[str, Any], ...], size_bytes: int) -> None:
        """Keep a response for an hour, if there is room for one of this size at all."""
        self._kept[body["id"]] = Stored(body, messages, size_bytes, self._clock() + KEPT_S)
        self._items |= {item["id"]: body["id"] for item in body["output"]}
        self._size_bytes += size_bytes
        self._drop_old()
        while len(self._kept) > self._most_responses or self._size_bytes > self._most_bytes:
            self.remove(next(iter(self._kept)))

    def get(self, response_id: str) -> Stored | None:
        """The response with this id. It may be called in any thread."""
        found = self._kept.get(response_id)
        return found if found is not None and found.until > self._clock() else None

    def item(self, item_id: str) -> dict[str, Any] | None:
        """The item of output with this id. It may be called in any thread."""
        found = self.get(self._items.get(item_id, ""))
        items = found.body["output"] if found is not None else ()
        return next((item for item in items if item["id"] == item_id), None)

    def remove(self, response_id: str) -> bool:
        """Forget a response. False if there is none with this id."""
        found = self._kept.pop(response_id, None)
        if found is not None:
            self._size_bytes -= found.size_bytes
            for item in found.body["output"]:
                self._items.pop(item["id"], None)
        return found is not None

    def _drop_old(self) -> None:
        now = self._clock()
        # They are in the order of their age.
        while self._kept and next(iter(self._kept.values())).until <= now:
            self.remove(next(iter(self._kept)))


def memory_of(value: object) -> int:
    """About how many bytes a value of JSON takes in memory."""
    total, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        total += sys.getsizeof(each)
        if isinstance(each, dict):
            waiting += each.keys()
            waiting += each.values()
        elif isinstance(each, list | tuple):
            waiting += each
    return total
