"""Whose announcements a server believes before it gives up its blocks."""

from __future__ import annotations

from random import Random

import pytest
import trio

from peerd.protocol.identity import PeerId
from peerd.protocol.records.envelope import ServerRecord
from peerd.protocol.span import Span
from peerd.routing.directory.holding import Holding
from peerd.spans.covered import MAX_DIALLED, is_left_covered, present

OWN = PeerId("own")


def holding(peer: str, span: str, *, slot: int = 0, state: str = "online") -> Holding:
    record = ServerRecord(
        seq=0,
        expires=0.0,
        model=bytes(32),
        span=Span.parse(span),
        state=state,
        dtype="float32",
        quantization="none",
        codecs=("exact",),
        throughput=1e12,
        free_tokens=0,
        max_length=64,
        slot=slot,
    )
    return Holding(PeerId(peer), record)


class World:
    """Who is there, and who was looked for in vain."""

    def __init__(self, there: str, absent: str = "", reached: str = "") -> None:
        self.there, self.absent, self.reached = set(there.split()), set(absent.split()), set(reached.split())
        self.dialled: list[str] = []

    async def reaches(self, peer_id: PeerId) -> bool:
        await trio.lowlevel.checkpoint()
        self.dialled.append(peer_id)
        return peer_id in self.there

    def is_absent(self, peer_id: PeerId) -> bool:
        return peer_id in self.absent

    def is_reached(self, peer_id: PeerId) -> bool:
        return peer_id in self.reached


async def covered(world: World, *holdings: Holding) -> bool:
    return await is_left_covered([holding("own", "0:4"), *holdings], OWN, Span(0, 4), world, Random(1))


@pytest.mark.parametrize(
    ("there", "holdings", "expected"),
    [
        ("a", [holding("a", "0:4")], True),
        ("", [holding("a", "0:4")], False),
        ("a b", [holding("a", "0:2"), holding("b", "1:6")], True),
        ("a", [holding("a", "0:2"), holding("b", "1:6")], False),
        ("a", [holding("a", "0:4", state="joining")], False),
        ("a", [holding("a", "0:4", state="draining")], False),
        # It means to move away.
        ("a", [holding("a", "0:4"), holding("a", "4:8", slot=8, state="joining")], False),
        ("own", [holding("own", "0:8", slot=1)], False),
    ],
)
async def test_only_servers_that_are_reached_cover_the_blocks(
    there: str, holdings: list[Holding], expected: bool
) -> None:
    assert await covered(World(there), *holdings) is expected


async def test_a_thousand_servers_that_are_not_there_cost_a_few_dials() -> None:
    ghosts = [holding(f"ghost {number}", "0:4") for number in range(1000)]
    world = World("")
    assert not await covered(world, *ghosts)
    assert len(world.dialled) == MAX_DIALLED
    # Those that are known to be absent are dialled last.
    world = World("a", " ".join(f"ghost{number}" for number in range(1000)))
    ghosts = [holding(f"ghost{number}", "0:4") for number in range(1000)]
    assert await covered(world, *ghosts, holding("a", "0:4"))


def test_servers_that_were_looked_for_in_vain_count_nowhere() -> None:
    found = [holding("a", "0:4"), holding("ghost", "4:8")]
    assert present(found, World("a", "ghost")) == found[:1]


async def test_servers_that_we_reached_before_are_dialled_among_any_number_of_made_up_ones():
    fakes = [holding(f"fake{number}", "0:4") for number in range(1000)]
    world = World("real", reached="real")
    assert await covered(world, *fakes, holding("real", "0:4"))
    assert len(world.dialled) == MAX_DIALLED


async def test_half_of_those_who_are_dialled_are_new_to_us():
    known = [f"known{number}" for number in range(100)]
    new = [f"new{number}" for number in range(100)]
    world = World("", reached=" ".join(known))
    assert not await covered(world, *(holding(peer, "0:4") for peer in [*known, *new]))
    assert sorted(peer in known for peer in world.dialled) == [False] * 16 + [True] * 16


async def test_where_few_are_known_the_others_are_dialled():
    world = World("", reached="a")
    assert not await covered(world, holding("a", "0:4"), *(holding(f"new{number}", "0:4") for number in range(40)))
    assert len(set(world.dialled)) == MAX_DIALLED
