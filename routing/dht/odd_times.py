"""Remembers servers whose genuine records are too old or from the future, because their clock or ours is wrong.

Such records do not count. But a client that finds no server because of them should be told, or its user would look for
the mistake everywhere else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.identity import PeerId
from peerd.protocol.records.envelope import ServerRecord, SignedRecord, open_untimely
from peerd.routing.clock import duration

# How long a server's signed record is valid (`routing.directory.announcer`).
TTL_S = 60.0
# The record of a crashed peer may be found for a moment after it has expired, because clocks differ a little.
MIN_ODD_S = TTL_S + 20.0
# How many peers are remembered, and for how long.
MAX_PEERS = 64
REMEMBERED_S = 300.0
# Old records are cheap to collect, and each costs a check of its signature.
MAX_CHECKED_A_LOOKUP = 4


class OddTimes:
    """For each peer the last record with an odd time: by how much it was odd, and when it came."""

    def __init__(self) -> None:
        self._odd: OrderedDict[PeerId, tuple[ServerRecord, float, float]] = OrderedDict()

    def note(self, refused: Collection[bytes], key: bytes, now: float) -> None:
        """Note those records under `key` with odd times that a lookup refused at `now` (unix seconds)."""
        for data in list(refused)[:MAX_CHECKED_A_LOOKUP]:
            try:
                record = open_untimely(SignedRecord.decode(data), key=key)
            except RemoteProtocolError:
                continue
            if isinstance(record.body, ServerRecord) and record.body.state != "offline":
                age_s = now - (record.body.expires - TTL_S)
                if age_s > MIN_ODD_S or age_s < 0:
                    self._odd[record.peer_id] = (record.body, age_s, now)
                    self._odd.move_to_end(record.peer_id)
        while len(self._odd) > MAX_PEERS:
            self._odd.popitem(last=False)

    def explain(self, model: bytes, missing: Collection[tuple[int, int]], now: float) -> list[str]:
        """The reasons why servers of these blocks of a model may be invisible, one sentence each."""
        return [
            f"server {peer_id}'s records are {duration(age_s)} {'old' if age_s > 0 else 'ahead'}: check its clock,"
            " or this machine's"
            for peer_id, (body, age_s, noted) in self._odd.items()
            if body.model == model
            and now - noted < REMEMBERED_S
            and any(body.span.start < end and start < body.span.end for start, end in missing)
        ]
