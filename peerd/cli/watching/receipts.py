"""`peerd receipts`: the totals of the receipts in a daemon's state directory."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from peerd.cli.console import short, table, write
from peerd.discovery.state_files import RECEIPTS_FILE
from peerd.protocol.errors import InvalidRequest
from peerd.routing.failures.receipts import OTHERS, ReceiptBook, Row

_MODEL_CHARS = 12


def show_receipts(state_dir: Path, *, as_json: bool) -> None:
    """Print the totals. Raises InvalidRequest for a file that cannot be read."""
    rows = list(_read(state_dir / RECEIPTS_FILE))
    write((json.dumps(as_values(rows), indent=2) if as_json else as_text(rows)) + "\n")


def as_values(rows: Iterable[Row]) -> dict[str, Any]:
    """All rows and their sum, as values for JSON. `receipt` is in base64 (spec/sessions/receipts.md)."""
    listed: list[dict[str, Any]] = [
        {
            "day": row.day.isoformat(),
            "model": row.model.hex(),
            "peer_id": row.peer_id,
            **_sums(row),
            "receipt": base64.b64encode(row.receipt).decode(),
        }
        for row in rows
    ]
    total = {name: sum(one[name] for one in listed) for name in ("sessions", "positions", "block_positions")}
    return {"rows": listed, "total": total}


def as_text(rows: Iterable[Row]) -> str:
    """Tables of the totals by day, by model and by client."""
    rows = list(rows)
    if not rows:
        return "no client has acknowledged anything yet"
    parts = [
        _totals("day", rows, lambda row: row.day.isoformat()),
        _totals("model", rows, lambda row: row.model.hex()[:_MODEL_CHARS]),
        _totals("client", rows, lambda row: row.peer_id if row.peer_id == OTHERS else short(row.peer_id), by_size=True),
    ]
    return "\n\n".join(parts)


def _totals(heading: str, rows: Iterable[Row], name_of: Callable[[Row], str], *, by_size: bool = False) -> str:
    sums: dict[str, list[int]] = {}
    for row in rows:
        total = sums.setdefault(name_of(row), [0, 0, 0])
        for at, value in enumerate(_sums(row).values()):
            total[at] += value
    listed = sorted(sums.items(), key=lambda item: (-item[1][1] if by_size else 0, item[0]))
    lines = [(name, *map(str, total)) for name, total in listed]
    return table([(heading, "sessions", "positions", "positions x blocks"), *lines])


def _sums(row: Row) -> dict[str, int]:
    return {"sessions": row.sessions, "positions": row.positions, "block_positions": row.block_positions}


def _read(path: Path) -> ReceiptBook:
    # At that time no day is long ago: to forget is the daemon's work.
    book = ReceiptBook(lambda: 0.0)
    try:
        book.load(path.read_text())
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"cannot read {path}: {error}") from None
    return book
