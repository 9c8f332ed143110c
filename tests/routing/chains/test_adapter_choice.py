"""Which peers a session with an adapter may use, and which adapter a name means."""

from random import Random

import pytest

from peerd.protocol.errors import NoChain
from peerd.protocol.identity import Identity
from peerd.protocol.records.envelope import PeerRecord, ServerRecord, sign_record
from peerd.protocol.span import Span
from peerd.routing.chains.adapter_choice import AdapterNeed, choose_adapter
from peerd.routing.chains.chain import ChainNeeds, plan_chain
from peerd.routing.directory.offer import Offer

POET, OTHER_POET, CLERK = "poet@" + 16 * "1", "poet@" + 16 * "2", "clerk@" + 16 * "3"
BLOCKS = Span(0, 8)


def offer(number, start, end, *adapters, state="online", dtype="float32", client_adapters=0):
    identity = Identity.from_seed(number.to_bytes(32, "big"))
    record = ServerRecord(
        seq=1,
        expires=60.0,
        model=bytes(32),
        span=Span(start, end),
        state=state,
        dtype=dtype,
        quantization="none",
        codecs=("exact",),
        throughput=100.0,
        free_tokens=1000,
        max_length=1000,
        adapters=adapters,
        client_adapters=client_adapters,
    )
    return Offer(identity.peer_id, record, (), sign_record(identity, PeerRecord(seq=1, expires=60.0, addresses=())))


def planned(offers, need):
    chain = plan_chain(offers, BLOCKS, needs=ChainNeeds(adapter=need), random=Random(0))
    return [(hop.peer_id, hop.span) for hop in chain.hops]


def test_a_chain_uses_only_peers_with_the_very_same_adapter():
    offers = [offer(1, 0, 8, OTHER_POET), offer(2, 0, 8), offer(3, 0, 5, CLERK, POET), offer(4, 3, 8, POET)]
    peers = [peer for peer, _ in planned(offers, AdapterNeed(POET))]
    assert peers == [offers[2].peer_id, offers[3].peer_id]
    with pytest.raises(NoChain, match=f"serves blocks 0:3 with the adapter {POET}"):
        planned(offers[:2] + offers[3:], AdapterNeed(POET))


def test_a_clients_own_adapter_must_fit_at_each_peer_in_what_it_computes_in():
    values = {block: 100 for block in range(2, 6)}
    need = AdapterNeed(own_values=values)
    half = [offer(1, 0, 4, dtype="bfloat16", client_adapters=400), offer(2, 4, 8, client_adapters=800)]
    assert len(planned(half, need)) == 2
    with pytest.raises(NoChain, match="serves blocks 0:4 with room for the client's own adapter"):
        planned([offer(1, 0, 4, client_adapters=799), half[1]], need)
    with pytest.raises(NoChain, match="4:8"):
        planned([half[0], offer(2, 4, 8, dtype="some new one", client_adapters=799)], need)
    # A peer that has no block of the adapter need not accept adapters.
    assert len(planned([offer(1, 0, 2), offer(2, 2, 6, client_adapters=1600), offer(3, 6, 8)], need)) == 3


def test_a_name_means_the_adapter_that_covers_all_blocks_and_that_most_peers_have():
    offers = [offer(1, 0, 8, POET), offer(2, 0, 4, OTHER_POET), offer(3, 4, 8, OTHER_POET, CLERK)]
    assert choose_adapter(offers, "poet", BLOCKS) == OTHER_POET
    assert choose_adapter(offers[:2], "poet", BLOCKS) == POET
    assert choose_adapter(offers, "clerk", Span(5, 8)) == CLERK
    tied = [offer(1, 0, 8, POET), offer(2, 0, 8, OTHER_POET)]
    assert choose_adapter(tied, "poet", BLOCKS) == choose_adapter(tied[::-1], "poet", BLOCKS) == OTHER_POET


def test_a_name_that_nobody_has_for_all_blocks_is_refused_with_what_there_is():
    offers = [offer(1, 0, 4, POET), offer(2, 4, 8, CLERK), offer(3, 4, 8, POET, state="draining")]
    with pytest.raises(NoChain, match=f"no reachable peer has an adapter 'critic' .* there is {CLERK}, {POET}"):
        choose_adapter(offers, "critic", BLOCKS)
    with pytest.raises(NoChain, match=f"serves blocks 4:8 with the adapter {POET}") as caught:
        choose_adapter(offers, "poet", BLOCKS)
    assert caught.value.missing == ((4, 8),)
    with pytest.raises(NoChain, match="there is none"):
        choose_adapter([], "poet", BLOCKS)
