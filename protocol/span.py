"""The span: a run of consecutive blocks, the unit in which peers host a model."""

from __future__ import annotations

import re
from dataclasses import dataclass

# BLOOM-176B has 70 blocks and Llama-3-405B 126; the bound only keeps hostile numbers small.
MAX_BLOCKS = 4096


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Blocks `start` to `end - 1`. Raises ValueError unless 0 <= start < end <= MAX_BLOCKS."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= MAX_BLOCKS:
            raise ValueError(f"a span is START:END with 0 <= START < END <= {MAX_BLOCKS}, not {self}")

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.end

    def covers(self, other: Span) -> bool:
        """Whether this span contains every block of `other`."""
        return self.start <= other.start and other.end <= self.end

    @classmethod
    def parse(cls, text: str) -> Span:
        """Read `"3:7"`. Raises ValueError."""
        match = re.fullmatch(r"(\d{1,5}):(\d{1,5})", text)
        if match is None:
            raise ValueError(f"a span is written START:END, such as 0:15, not {text!r}")
        return cls(int(match[1]), int(match[2]))
