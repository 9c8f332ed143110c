"""A part of a chain as an application sees it: which peer serves which blocks."""

from __future__ import annotations

from dataclasses import dataclass

from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span


@dataclass(frozen=True, slots=True)
class ServedBy:
    """`peer` serves the blocks of `span`."""

    peer: PeerId
    span: Span

    def __str__(self) -> str:
        return f"{self.peer} {self.span}"
