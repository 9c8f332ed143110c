"""Remembers which peers computed something else than others: they are avoided for a day, also after a restart.

A conviction differs from a failure: it is no accident, so neither an answer nor a success ends it early. Times are
seconds since 1970, for they outlive the process.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from peerd.protocol.identity import PeerId, public_key_of

CONVICTED_S = 86400.0
# After a conviction has ended, it is remembered for this long, so that operators see repeated ones.
REMEMBERED_S = 30 * 86400.0
# Each takes three servers' evidence, so strangers cannot make up many.
MAX_CONVICTED = 1024


@dataclass(frozen=True, slots=True)
class Conviction:
    """A peer is avoided until then. count: how often it was convicted. why: what the last audit found."""

    peer_id: PeerId
    until: float
    count: int
    why: str


class Convictions:
    """The convicted peers. `now` returns seconds since 1970."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._of: dict[PeerId, Conviction] = {}

    def __repr__(self) -> str:
        return f"<Convictions {len(self._of)}>"

    def convict(self, peer_id: PeerId, why: str) -> None:
        """Avoid the peer for a day from now on."""
        before = self._of.pop(peer_id, None)
        count = before.count + 1 if before is not None else 1
        self._add(Conviction(peer_id, self._now() + CONVICTED_S, count, why))

    def standing(self) -> list[Conviction]:
        """The convictions that hold now, oldest first."""
        now = self._now()
        return [one for one in self._of.values() if now < one.until]

    def get(self, peer_id: PeerId) -> Conviction | None:
        """The conviction that holds against a peer now."""
        one = self._of.get(peer_id)
        return one if one is not None and self._now() < one.until else None

    def peers(self) -> frozenset[PeerId]:
        """The peers that are avoided now."""
        return frozenset(one.peer_id for one in self.standing())

    def to_json(self) -> str:
        """All that is remembered, as the text of a file."""
        kept = [one for one in self._of.values() if self._now() < one.until + REMEMBERED_S]
        rows = [{"peer": one.peer_id, "until": one.until, "count": one.count, "why": one.why} for one in kept]
        return json.dumps({"peerd_convictions": 1, "convicted": rows}, indent=1) + "\n"

    def load(self, text: str) -> None:
        """Add what `to_json` wrote. Raises ValueError."""
        try:
            fields = json.loads(text)
            if fields["peerd_convictions"] != 1:
                raise ValueError("not of version 1")
            for row in fields["convicted"]:
                # A clock that was wrong when the file was written must not convict for ever.
                until = min(float(row["until"]), self._now() + CONVICTED_S)
                public_key_of(row["peer"])
                self._add(Conviction(PeerId(row["peer"]), until, int(row["count"]), str(row["why"])))
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a list of convictions: {error!r}") from None

    def _add(self, conviction: Conviction) -> None:
        self._of[conviction.peer_id] = conviction
        if len(self._of) > MAX_CONVICTED:
            del self._of[next(iter(self._of))]
