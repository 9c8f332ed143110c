"""Which peers a client allows in its chains, whatever the swarm announces."""

from __future__ import annotations

from random import Random

import pytest

from peerd.protocol.errors import InvalidRequest, NoChain
from peerd.protocol.records.envelope import block_roots
from peerd.protocol.span import Span
from peerd.routing.chains.chain import ChainNeeds, plan_chain
from peerd.routing.chains.rules import ChainRules, Manifest

DIGESTS = tuple(bytes([number]) * 32 for number in range(20))
MANIFEST = Manifest(bytes(range(32)), DIGESTS)


def rooted(make_offer, number, blocks, digests=DIGESTS, **fields):
    span = Span.parse(blocks)
    return make_offer(number, blocks, block_roots=block_roots(span, digests[span.start : span.end]), **fields)


def peers_of(chain):
    return [hop.peer_id for hop in chain.hops]


def plan(offers, blocks, **needs):
    return plan_chain(offers, Span.parse(blocks), needs=ChainNeeds(**needs), random=Random(0))


def test_a_blocked_peer_and_one_that_is_not_allowed_are_left_out(make_offer):
    offers = [make_offer(number, "0:8") for number in range(3)]
    one, two, three = (offer.peer_id for offer in offers)
    assert ChainRules(blocked=frozenset({one})).permitted(offers) == offers[1:]
    assert ChainRules(allowed=frozenset({one, two}), blocked=frozenset({two})).permitted(offers) == offers[:1]
    assert ChainRules(allowed=frozenset()).permitted(offers) == []
    assert three


def test_only_peers_that_announce_the_manifest_s_weights_are_permitted(make_offer):
    good = rooted(make_offer, 0, "3:19")
    other = rooted(make_offer, 1, "3:19", digests=(*DIGESTS[:18], b"x" * 32, DIGESTS[19]))
    silent = make_offer(2, "3:19")
    beyond = rooted(make_offer, 3, "10:24", digests=DIGESTS + DIGESTS)
    assert ChainRules(manifests=(MANIFEST,)).permitted([good, other, silent, beyond]) == [good]


def test_a_manifest_binds_its_own_model_only(make_offer):
    offer = make_offer(0, "0:8")
    assert ChainRules(manifests=(Manifest(b"o" * 32, DIGESTS),)).permitted([offer]) == [offer]


def test_the_majority_does_not_outvote_a_manifest(make_offer):
    liars = [rooted(make_offer, number, "0:16", digests=(b"x" * 32,) * 20) for number in range(5)]
    honest = rooted(make_offer, 9, "0:16", throughput=1)
    chain = plan(ChainRules(manifests=(MANIFEST,)).permitted([*liars, honest]), "0:16")
    assert peers_of(chain) == [honest.peer_id]


def test_a_manifest_survives_its_file(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text(MANIFEST.to_json())
    assert Manifest.read(path) == MANIFEST


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"peerd_manifest": 1}', '{"peerd_manifest": 1, "model": "00", "blocks": []}', "[" * 9999],
    ids=lambda text: text[:20],
)
def test_what_is_no_manifest_is_refused(tmp_path, text):
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=r"manifest\.json"):
        Manifest.read(path)


def test_first_and_last_blocks_are_run_by_trusted_peers_only(make_offer):
    fast = make_offer(0, "0:12", throughput=100_000)
    slow_start, slow_end = make_offer(1, "0:4", throughput=20), make_offer(2, "8:12", throughput=20)
    trusted = frozenset({slow_start.peer_id, slow_end.peer_id})
    first_by, last_by = ChainRules(trusted=trusted).ends(Span(0, 12), 12)
    chain = plan([fast, slow_start, slow_end], "0:12", first_by=first_by, last_by=last_by)
    assert peers_of(chain) == [slow_start.peer_id, fast.peer_id, slow_end.peer_id]
    # No further than it must: trust is for the ends.
    assert [str(hop.span) for hop in chain.hops] == ["0:1", "1:11", "11:12"]


def test_trust_is_asked_for_at_the_model_s_ends_and_not_inside(make_offer):
    rules = ChainRules(trusted=frozenset({make_offer(0, "0:4").peer_id}))
    assert rules.ends(Span(0, 6), 12) == (rules.trusted, None)
    assert rules.ends(Span(3, 6), 12) == (None, None)
    assert rules.ends(Span(6, 12), 12) == (None, rules.trusted)
    assert ChainRules().ends(Span(0, 12), 12) == (None, None)


def test_where_no_trusted_peer_serves_an_end_the_caller_is_told(make_offer):
    offers = [make_offer(0, "0:12"), make_offer(1, "0:4")]
    only = frozenset({offers[1].peer_id})
    with pytest.raises(NoChain, match="no trusted peer serves blocks 11:12"):
        plan(offers, "0:12", first_by=only, last_by=only)
