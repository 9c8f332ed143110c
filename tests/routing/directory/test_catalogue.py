"""The names of models, and which peers announce them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.records.envelope import ModelRecord, VerifiedRecord, open_record, sign_record
from peerd.routing.dht.record_sets import RecordKey, words_for_models
from peerd.routing.directory.catalogue import ANNOUNCERS, least_rate, named_models, should_announce

OTHER = bytes(range(1, 33))


class Source:
    """A DHT in which some have said what models are called."""

    def __init__(self, epoch: float) -> None:
        self.epoch = epoch
        self.records: list[VerifiedRecord] = []

    def say(self, number: int, model: bytes, name: str, commit: str = "c" * 40, blocks: int = 8) -> PeerId:
        identity = Identity.from_seed(number.to_bytes(32, "big"))
        words = ModelRecord(1, self.epoch + 300, model, name, f"org/{name}", commit, blocks)
        self.records.append(open_record(sign_record(identity, words), now=self.epoch, key=words_for_models().key))
        return identity.peer_id

    async def get_many(self, wanted: Sequence[RecordKey], *, whole: bool = False) -> list[list[VerifiedRecord]]:
        assert list(wanted) == [words_for_models()]
        assert whole
        return [self.records]


async def test_a_model_is_called_what_most_say_it_is(epoch: float) -> None:
    source = Source(epoch)
    source.say(1, OTHER, "other")
    peers = {source.say(number, bytes(32), "llama") for number in range(2, 5)}
    peers |= {source.say(5, bytes(32), "a-lie"), source.say(6, bytes(32), "llama", commit="d" * 40)}
    llama, other = await named_models(source)
    assert (llama.hub_id, llama.commit, llama.block_count, set(llama.announcers)) == ("org/llama", "c" * 40, 8, peers)
    assert (str(other), len(other.announcers)) == ("org/other", 1)


async def test_sixteen_of_all_that_serve_a_model_say_so_and_all_agree_who(epoch: float) -> None:
    source = Source(epoch)
    peers = {source.say(number, OTHER, "llama") for number in range(40)}
    models = await named_models(source)
    chosen = {peer for peer in peers if should_announce(models, OTHER, peer)}
    assert len(chosen) == ANNOUNCERS
    source.records = [record for record in source.records if record.peer_id in chosen]
    models = await named_models(source)
    assert {peer for peer in peers if should_announce(models, OTHER, peer)} == chosen, "it comes to rest"
    source.records.pop()
    models = await named_models(source)
    assert len({peer for peer in peers if should_announce(models, OTHER, peer)}) >= ANNOUNCERS
    assert should_announce([], OTHER, next(iter(peers)))


def test_a_model_needs_us_most_where_a_session_gets_least(make_offer: Callable[..., Any]) -> None:
    def rate(*spans: tuple[str, float, float]) -> float:
        offers = [
            make_offer(number, span, throughput=speed, queue_s=queue_s)
            for number, (span, speed, queue_s) in enumerate(spans)
        ]
        return least_rate(offers, 8)

    assert rate(("0:4", 100, 0)) == 0, "nobody serves the rest"
    assert rate(("0:4", 100, 0), ("4:8", 400, 0)) == pytest.approx(25)
    # A server with a queue does less for one more session.
    assert rate(("0:4", 100, 0), ("4:8", 400, 0.99)) == pytest.approx(1)
    assert rate(("0:8", 80, 0), ("0:8", 80, 0)) == pytest.approx(20)
