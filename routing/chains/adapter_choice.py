"""Finds out which peers can run a session's adapter, and which adapter a name means.

Peers may announce different weights under one name, and a chain that mixes them would answer with neither. So an
adapter id is a name with the beginning of a digest, and a client turns a name into an id once, before a session
opens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from peerd.protocol.errors import NoChain
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.adapters import name_of
from peerd.protocol.span import Span
from peerd.routing.directory.offer import Offer
from peerd.routing.directory.standing import StandingOf, unknown, weight_of

# Bytes of a value in the dtypes in which peers compute; an unknown dtype counts as wide (4 bytes).
_VALUE_BYTES = {"float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class AdapterNeed:
    """The adapter that a session needs on its hops: an `id`, or room for the client's own adapter.

    own_values: for each block that the client's own adapter changes, how many values it has there.
    """

    id: str = ""
    own_values: Mapping[int, int] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.own_values:
            return " with room for the client's own adapter"
        return f" with the adapter {self.id}" if self.id else ""

    def met_by(self, offer: Offer, blocks: Span) -> bool:
        """Whether the offering peer has the adapter, or has room for the client's own in its part of `blocks`."""
        if self.id:
            return self.id in offer.record.adapters
        if not self.own_values:
            return True
        first, end = max(offer.span.start, blocks.start), min(offer.span.end, blocks.end)
        values = sum(self.own_values.get(block, 0) for block in range(first, end))
        return offer.record.client_adapters >= values * value_bytes(offer.record.dtype)


NO_ADAPTER = AdapterNeed()


def value_bytes(dtype: str) -> int:
    """How many bytes one value of an adapter counts for on a peer that computes in `dtype`."""
    return _VALUE_BYTES.get(dtype, 4)


def choose_adapter(offers: Iterable[Offer], name: str, blocks: Span, standing: StandingOf = unknown) -> str:
    """The id that `name` means for `blocks`: of the ids announced for all of them, that of the peers that weigh most.

    If two weigh the same, the greater id: every client must decide alike. Raises NoChain, naming the
    adapters that there are.
    """
    usable = [offer for offer in offers if offer.record.state == "online"]
    spans: dict[str, list[Span]] = defaultdict(list)
    peers: dict[str, set[PeerId]] = defaultdict(set)
    for offer in usable:
        if offer.span.start < blocks.end and blocks.start < offer.span.end:
            for adapter in offer.record.adapters:
                spans[adapter].append(offer.span)
                peers[adapter].add(offer.peer_id)
    found = [adapter for adapter in spans if name in (adapter, name_of(adapter))]
    if not found:
        there = ", ".join(sorted(spans)) or "none"
        raise NoChain(f"no reachable peer has an adapter {name!r} for blocks {blocks}; there is {there}")
    missing = {adapter: _missing(spans[adapter], blocks) for adapter in found}
    whole = [adapter for adapter in found if not missing[adapter]]
    if not whole:
        best = min(found, key=lambda adapter: (len(missing[adapter]), adapter))
        runs = tuple(missing[best])
        parts = ", ".join(f"{start}:{end}" for start, end in runs)
        raise NoChain(f"no reachable peer serves blocks {parts} with the adapter {best}", runs)
    return max(whole, key=lambda adapter: (weight_of(peers[adapter], standing), adapter))


def _missing(spans: Iterable[Span], blocks: Span) -> list[tuple[int, int]]:
    missing = []
    reached = blocks.start
    for span in sorted(spans, key=lambda span: span.start):
        if span.start > reached:
            missing.append((reached, min(span.start, blocks.end)))
        reached = max(reached, span.end)
    if reached < blocks.end:
        missing.append((reached, blocks.end))
    return missing
