"""How far apart honest servers may be, by what they announce about their numerics: a table that was measured.

`peerd calibrate` makes the table from a model. The one that comes with peerd was made from a small model, on CPUs; it
says how. Limits grow with the number of blocks, so there are two for each pair of classes: over a whole model, and over
a part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from peerd.protocol.span import MAX_BLOCKS, Span

# Its errors were not measured, and are smaller: it has three more bits.
_AT_MOST = {"float16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Numerics:
    """How a server computes, as it announces it. `device` is "cpu", "cuda" or "" if unknown."""

    dtype: str
    quantization: str
    device: str = ""

    def __str__(self) -> str:
        return f"{self.dtype}/{self.quantization}" + (f"@{self.device}" if self.device else "")

    @property
    def rows(self) -> tuple[str, ...]:
        """The names under which its errors may stand in a table, the most exact first."""
        dtype = _AT_MOST.get(self.dtype, self.dtype)
        return str(self), f"{self.dtype}/{self.quantization}", f"{dtype}/{self.quantization}"


Pair = tuple[Numerics, Numerics]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The limits for pairs of numerics, over all blocks of a model and over a part of them.

    made: how the table was made, for its readers.
    """

    whole: Mapping[frozenset[str], float]
    part: Mapping[frozenset[str], float]
    made: Mapping[str, Any]

    def limit(self, pairs: Iterable[Pair], *, is_whole: bool, blocks: int = 0) -> float | None:
        """The distance that two honest chains do not exceed, if in some blocks these pairs of servers met.

        The worst pair decides, as if it had computed all blocks. None if a pair was not measured.

        blocks: how many blocks the chains have. Where these are more than those that were measured, the limit grows
            in proportion: rounding errors do not grow faster.
        """
        limits = self.whole if is_whole else self.part
        found = [_lookup(limits, pair) for pair in pairs]
        if None in found:
            return None
        worst = max((each for each in found if each is not None), default=None)
        return None if worst is None else worst * max(1.0, blocks / self._measured(is_whole))

    def _measured(self, is_whole: bool) -> int:
        """How many blocks the table was measured over; without a word of it, any number."""
        spans = [Span.parse(str(each)) for each in self.made.get("spans", ())]
        if not spans:
            return MAX_BLOCKS
        return max(span.end for span in spans) if is_whole else max(map(len, spans))

    def to_json(self) -> str:
        """The table as the text of a file."""
        tables = {
            name: {" ".join(sorted(pair) * (3 - len(pair) if len(pair) == 1 else 1)): limit for pair, limit in limits}
            for name, limits in (("whole", self.whole.items()), ("part", self.part.items()))
        }
        return json.dumps({"peerd_thresholds": 1, "made": dict(self.made), **tables}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Thresholds:
        """Read what `to_json` wrote. Raises ValueError."""
        try:
            fields = json.loads(text)
            if fields["peerd_thresholds"] != 1:
                raise ValueError("not of version 1")
            whole, part = (
                {frozenset(pair.split()): float(limit) for pair, limit in fields[name].items()}
                for name in ("whole", "part")
            )
            table = cls(whole, part, fields["made"])
            table._measured(True)
            return table
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a table of thresholds: {error!r}") from None


def _lookup(limits: Mapping[frozenset[str], float], pair: Pair) -> float | None:
    one, other = pair
    names = (frozenset((row, column)) for row in one.rows for column in other.rows)
    return next((limits[name] for name in names if name in limits), None)


@cache
def own_thresholds() -> Thresholds:
    """The table that comes with peerd."""
    return Thresholds.from_json(files("peerd.compute.audits").joinpath("thresholds.json").read_text())
