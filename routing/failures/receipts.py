"""Adds up what clients acknowledged that we computed for them, by day, model and client, for our operator.

It changes nothing about how a client is served: clients have as many keys as they like, and can acknowledge to one of
their own servers what they please. Days are those of UTC.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Final

from peerd.protocol.identity import PeerId, public_key_of
from peerd.protocol.messages.receipts import MODEL_BYTES, RECEIPT_BYTES, Receipt

# A row has about 400 bytes in the file, which is written once a minute at most.
MAX_ROWS: Final = 2048
KEPT_DAYS: Final = 400
#: In place of a PeerId: clients whose rows were merged because there were too many.
OTHERS: Final = PeerId("others")
_MOST: Final = 2**63 - 1


@dataclass(slots=True)
class Row:
    """What one client acknowledged on one day for one model.

    positions: of all sessions. block_positions: positions times the blocks that they went through. sessions: how many
    hops of sessions were acknowledged for the first time. receipt: the last one, as it was signed; empty for OTHERS.
    """

    day: date
    model: bytes
    peer_id: PeerId
    sessions: int = 0
    positions: int = 0
    block_positions: int = 0
    receipt: bytes = b""


class ReceiptBook:
    """The totals. `now` returns unix seconds, because they outlive the process."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._rows: dict[tuple[date, bytes, PeerId], Row] = {}

    def __repr__(self) -> str:
        return f"<ReceiptBook of {len(self._rows)} rows>"

    @property
    def is_used(self) -> bool:
        """Whether anything was acknowledged."""
        return bool(self._rows)

    def __iter__(self) -> Iterator[Row]:
        """The rows, oldest day first."""
        return iter(sorted(self._rows.values(), key=lambda row: (row.day, row.model, row.peer_id)))

    def add(self, client: PeerId, receipt: Receipt, signed: bytes, gained: int, is_first: bool) -> None:
        """Note a valid receipt, which acknowledges `gained` positions more than those before it in its session."""
        rows = len(self._rows)
        row = self._row(self._today(), receipt.model, client)
        row.sessions += is_first
        row.positions += gained
        row.block_positions += gained * (receipt.end - receipt.start)
        row.receipt = signed
        if len(self._rows) > rows:
            self._shrink()

    def dump(self) -> str:
        """The rows as text, for `load` after a restart."""
        rows = [
            [
                row.day.isoformat(),
                row.model.hex(),
                row.peer_id,
                row.sessions,
                row.positions,
                row.block_positions,
                base64.b64encode(row.receipt).decode(),
            ]
            for row in self
        ]
        return json.dumps({"peerd_receipts": 1, "rows": rows}) + "\n"

    def load(self, text: str) -> None:
        """Add what `dump` wrote. Raises ValueError."""
        try:
            fields = json.loads(text)
            if fields["peerd_receipts"] != 1:
                raise ValueError("not of version 1")
            for row in map(_read, fields["rows"]):
                self._rows[row.day, row.model, row.peer_id] = row
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a list of receipts: {error!r}") from None
        self._shrink()

    def _today(self) -> date:
        return datetime.fromtimestamp(self._now(), UTC).date()

    def _row(self, day: date, model: bytes, peer_id: PeerId) -> Row:
        return self._rows.setdefault((day, model, peer_id), Row(day, model, peer_id))

    def _shrink(self) -> None:
        """Merge the clients with least while there are too many rows; forget days that are long ago."""
        oldest = self._today().toordinal() - KEPT_DAYS
        for key in [key for key in self._rows if key[0].toordinal() < oldest]:
            del self._rows[key]
        while len(self._rows) > MAX_ROWS:
            clients = [row for row in self._rows.values() if row.peer_id != OTHERS]
            if not clients:
                del self._rows[min(self._rows)]
                continue
            least = min(clients, key=lambda row: row.positions)
            del self._rows[least.day, least.model, least.peer_id]
            others = self._row(least.day, least.model, OTHERS)
            others.sessions += least.sessions
            others.positions += least.positions
            others.block_positions += least.block_positions


def _read(fields: list[object]) -> Row:
    """A row of the file. Raises ValueError or TypeError."""
    day, model, name, *numbers, receipt = fields
    if not (isinstance(day, str) and isinstance(model, str) and isinstance(name, str) and isinstance(receipt, str)):
        raise ValueError(f"no row of receipts: {fields!r}")
    if name != OTHERS:
        public_key_of(PeerId(name))
    if len(numbers) != 3 or not all(type(number) is int and 0 <= number <= _MOST for number in numbers):
        raise ValueError(f"no totals: {numbers!r}")
    signed, digest = base64.b64decode(receipt, validate=True), bytes.fromhex(model)
    if len(signed) not in (0, RECEIPT_BYTES) or len(digest) != MODEL_BYTES:
        raise ValueError(f"no receipt or model: {receipt!r}, {model!r}")
    sessions, positions, block_positions = (number for number in numbers if isinstance(number, int))
    return Row(date.fromisoformat(day), digest, PeerId(name), sessions, positions, block_positions, signed)
