"""Made-up servers outvote nobody: neither on a model's weights nor on what an adapter's name means."""

from __future__ import annotations

from random import Random

import pytest
import trio

from peerd.client.finding.finder import SwarmFinder
from peerd.protocol.errors import NoChain
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.records.envelope import PeerRecord, ServerRecord, sign_record
from peerd.protocol.span import Span
from peerd.routing.chains.adapter_choice import choose_adapter
from peerd.routing.directory.offer import Offer, agreeing
from peerd.routing.directory.standing import Standing
from peerd.routing.failures.track_record import TrackRecord

MODEL = bytes(range(32))
GOOD, EVIL = b"\1" * 32, b"\2" * 32
HONEST, MADE_UP = range(4), range(100, 150)


def offer(number: int, root: bytes, **fields: object) -> Offer:
    identity = Identity.from_seed(number.to_bytes(32, "big"))
    body: dict[str, object] = {
        "seq": 1,
        "expires": 60.0,
        "model": MODEL,
        "span": Span(0, 8),
        "state": "online",
        "dtype": "float32",
        "quantization": "none",
        "codecs": ("exact",),
        "throughput": 1000.0,
        "free_tokens": 4096,
        "max_length": 2048,
        "block_roots": (root,),
    }
    peer = PeerRecord(seq=1, expires=60.0, addresses=("/ip4/10.0.0.1/tcp/1/ws",))
    return Offer(identity.peer_id, ServerRecord(**(body | fields)), (), sign_record(identity, peer))


OFFERS = [*(offer(number, GOOD) for number in HONEST), *(offer(number, EVIL) for number in MADE_UP)]
HONEST_PEERS = {one.peer_id for one in OFFERS[: len(HONEST)]}
MADE_UP_PEERS = {one.peer_id for one in OFFERS[len(HONEST) :]}


class Announced:
    """A directory with these offers."""

    async def servers(self, model: bytes, block_count: int, *, max_age_s: float = 0.0) -> list[Offer]:
        await trio.lowlevel.checkpoint()
        return OFFERS

    def doubt(self, peer_id: PeerId) -> None:
        pass

    def odd_clocks(self, model: bytes, missing: object) -> list[str]:
        return []


@pytest.fixture
def track_record() -> TrackRecord:
    return TrackRecord(trio.current_time, by_proof=True)


@pytest.fixture
def finder(track_record: TrackRecord) -> SwarmFinder:
    return SwarmFinder(Announced(), track_record, MODEL, 8, Random(1))


async def first_hop(finder: SwarmFinder) -> PeerId:
    return (await finder.find(Span(0, 8), tokens=10, exclude=())).hops[0].peer_id


async def test_one_that_we_reached_outweighs_any_number_of_which_we_only_heard(
    finder: SwarmFinder, track_record: TrackRecord
) -> None:
    assert await first_hop(finder) in MADE_UP_PEERS
    track_record.reached(OFFERS[0].peer_id, "")
    with pytest.raises(NoChain):
        # The view is as old as before; a plan that fails has another look.
        await finder.find(Span(0, 8), tokens=10, exclude=HONEST_PEERS | MADE_UP_PEERS)
    assert await first_hop(finder) in HONEST_PEERS


async def test_those_who_are_not_there_stand_in_nobodys_way(finder: SwarmFinder, track_record: TrackRecord) -> None:
    """Each that is tried and cannot be reached has no voice any more, and the others are used in the end."""
    tried: set[PeerId] = set()
    while (peer := await first_hop(finder)) in MADE_UP_PEERS:
        assert peer not in tried
        tried.add(peer)
        finder.failed(peer)
    assert peer in HONEST_PEERS


def test_all_peers_of_one_network_are_one_voice() -> None:
    def standing(peer: PeerId) -> Standing:
        return Standing("93.184.216.0/24" if peer in MADE_UP_PEERS else peer, is_reached=True)

    assert {one.peer_id for one in agreeing(OFFERS, standing)} == HONEST_PEERS


def test_who_served_us_is_believed_before_who_was_reached(track_record: TrackRecord) -> None:
    for peer in MADE_UP_PEERS:
        track_record.reached(peer, f"net of {peer}")
    track_record.succeeded(OFFERS[0].peer_id)
    assert {one.peer_id for one in agreeing(OFFERS, track_record.standing)} == HONEST_PEERS


async def test_one_that_failed_after_it_was_reached_keeps_its_voice(track_record: TrackRecord) -> None:
    """Or the weights of a live session's chain would change with every death in it."""
    track_record.reached(OFFERS[0].peer_id, "")
    track_record.failed(OFFERS[0].peer_id)
    assert {one.peer_id for one in agreeing(OFFERS, track_record.standing)} == HONEST_PEERS


def test_squatters_do_not_decide_what_an_adapters_name_means(track_record: TrackRecord) -> None:
    ours, theirs = "poet@" + "1" * 16, "poet@" + "f" * 16
    offers = [offer(1, GOOD, adapters=(ours,)), *(offer(number, GOOD, adapters=(theirs,)) for number in MADE_UP)]
    assert choose_adapter(offers, ours, Span(0, 8), track_record.standing) == ours
    track_record.reached(offers[0].peer_id, "")
    assert choose_adapter(offers, "poet", Span(0, 8), track_record.standing) == ours
