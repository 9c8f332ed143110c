"""Amounts of memory as people write them: `8GiB`, `500MB`, `1.5g`.

G has two meanings: `GB` is 10^9 bytes, as on a disk's label; `GiB`, and the bare `G` of most tools that count memory,
is 2^30.
"""

from __future__ import annotations

import re
from decimal import Decimal

_PREFIXES = "KMGTP"
_SIZE = re.compile(rf"(\d+(?:\.\d+)?)\s*(?:([{_PREFIXES}])(i?B?)|B)?", re.IGNORECASE | re.ASCII)
_MAX_BYTES = 2**63 - 1


def parse_size(text: str) -> int:
    """The bytes in `text`; fractions of a byte are cut off. Raises ValueError if it is not a positive size."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"a size is written such as 8GiB, 500MB or 1.5G, not {text!r}")
    number, prefix, suffix = match.groups()
    base = 1000 if suffix in ("B", "b") else 1024
    exponent = _PREFIXES.index(prefix.upper()) + 1 if prefix else 0
    size = int(Decimal(number) * base**exponent)
    if not 0 < size <= _MAX_BYTES:
        raise ValueError(f"a size is at least one byte and less than 8192 PiB, not {text!r}")
    return size


def format_size(size: int) -> str:
    """Write `size` bytes in the largest binary unit of which there is at least one: `512 B`, `1.5 GiB`."""
    scaled, units = float(size), ["B", *(f"{prefix}iB" for prefix in _PREFIXES)]
    while round(scaled, 1) >= 1024 and len(units) > 1:
        scaled /= 1024
        units.pop(0)
    return f"{scaled:.1f}".removesuffix(".0") + f" {units[0]}"
