"""Remembers what peers gave us: sessions that they served, and blocks that we saw them serve.

A server gives such peers more of its device, for a key costs nothing and a contribution does not. Only what we saw
ourselves counts, because what peers say of each other costs them nothing either. A credit is halved every six hours.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from peerd.protocol.identity import PeerId

# A stranger weighs 1. A peer that serves blocks weighs 3 more, and one that served sessions of ours lately up to 4
# more. A weight makes what the peer computes count less in its network's turn; it gives the network no second turn.
STRANGER: Final = 1.0
FOR_SERVING: Final = 3.0
FOR_SERVING_US: Final = 4.0
# Blocks count that we saw a peer serve for an hour, at least once an hour. That is cheap to pretend: one process can
# have many keys. So the weights of one network are not added up (`Owner.share`).
SERVED_FOR_S: Final = 3600.0
SEEN_WITHIN_S: Final = 3600.0
# Minutes in which a peer served us count, not answers: one long session has thousands. Eight minutes are a full credit.
MINUTE_S: Final = 60.0
CREDIT_A_MINUTE: Final = 1 / 8
HALF_LIFE_S: Final = 6 * 3600.0
# Below this a credit is forgotten.
LEAST_CREDIT: Final = 1 / 64
# The peers that gave something longest ago are forgotten first.
MAX_PEERS: Final = 4096


@dataclass(slots=True)
class _Given:
    credit: float = 0.0
    credited_s: float = float("-inf")
    serving_since_s: float = float("-inf")
    seen_s: float = float("-inf")

    def credit_at(self, now: float) -> float:
        age_s = max(0.0, now - self.credited_s)
        return self.credit * 0.5 ** (age_s / HALF_LIFE_S) if self.credit else 0.0

    def is_serving_at(self, now: float) -> bool:
        return now - self.seen_s <= SEEN_WITHIN_S and self.seen_s - self.serving_since_s >= SERVED_FOR_S


class Contributions:
    """What peers gave us. `now` returns unix seconds, because credits outlive the process."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._given: OrderedDict[PeerId, _Given] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Contributions of {len(self._given)} peers>"

    def served_us(self, peer_id: PeerId) -> None:
        """Note that the peer has just answered a session of ours."""
        given, now = self._touch(peer_id), self._now()
        if now - given.credited_s >= MINUTE_S:
            given.credit = min(1.0, given.credit_at(now) + CREDIT_A_MINUTE)
            given.credited_s = now

    def seen_serving(self, peer_id: PeerId) -> None:
        """Note that we reach the peer now, and that it announces blocks."""
        given, now = self._touch(peer_id), self._now()
        if now - given.seen_s > SEEN_WITHIN_S:
            given.serving_since_s = now
        given.seen_s = now

    def weight(self, peer_id: PeerId) -> float:
        """How much of the device the peer gets, where a stranger gets 1: at most 8."""
        given = self._given.get(peer_id)
        if given is None:
            return STRANGER
        now = self._now()
        for_serving = FOR_SERVING if given.is_serving_at(now) else 0.0
        return STRANGER + for_serving + FOR_SERVING_US * given.credit_at(now)

    def dump(self) -> str:
        """The credits as text, for `load` after a restart."""
        now = self._now()
        kept = [
            [peer_id, round(given.credit, 4), int(given.credited_s)]
            for peer_id, given in self._given.items()
            if given.credit_at(now) >= LEAST_CREDIT
        ]
        return json.dumps(kept) + "\n"

    def load(self, text: str) -> None:
        """Take the credits of an earlier process. Raises ValueError for text that `dump` did not write."""
        try:
            for name, credit, credited_s in json.loads(text):
                if not (isinstance(name, str) and 0 <= float(credit) <= 1):
                    raise ValueError(f"no credit: {name!r}, {credit!r}")
                given = self._touch(PeerId(name))
                # A clock that was ahead must not keep a credit for ever.
                given.credit, given.credited_s = float(credit), min(float(credited_s), self._now())
        except (TypeError, OverflowError, RecursionError) as error:
            raise ValueError(str(error)) from None

    def _touch(self, peer_id: PeerId) -> _Given:
        given = self._given.setdefault(peer_id, _Given())
        self._given.move_to_end(peer_id)
        if len(self._given) > MAX_PEERS:
            self._given.popitem(last=False)
        return given
