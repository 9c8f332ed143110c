"""Measures how long a client takes to plan: a chain over 128 blocks from the offers of 1000 peers.

    python -m benchmarks.costs.planning_bench

Prints the least of many times, in milliseconds of this thread's CPU time: with offers that were just found; with the
same offers again; for replacing one hop; and for a training pass of 64 requests.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from random import Random

from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.records.envelope import PeerRecord, ServerRecord, block_roots, sign_record
from peerd.protocol.span import Span
from peerd.routing.chains.chain import ChainNeeds, OfferTable, plan_chain
from peerd.routing.directory.offer import Offer

PEERS, BLOCKS = 1000, 128
MODEL = bytes(range(32))
REPEATS = 40


def make_offers(shortest: int, longest: int, random: Random) -> tuple[list[Offer], dict[PeerId, float]]:
    """Make peers in a square 150 ms wide, with spans of various lengths, and the delays that a client in the middle
    measured.
    """
    identities = [Identity.from_seed(number.to_bytes(32, "big")) for number in range(PEERS)]
    places = [(random.random(), random.random()) for _ in range(PEERS)]
    spans = []
    for number in range(PEERS):
        length = random.randint(shortest, longest)
        start = (0, BLOCKS - length, random.randint(0, BLOCKS - length))[min(number % 50, 2)]
        spans.append(Span(start, start + length))
    record = sign_record(identities[0], PeerRecord(seq=1, expires=1.0, addresses=("/ip4/192.0.2.1/tcp/1/ws",)))

    def apart_s(one: tuple[float, float], other: tuple[float, float]) -> float:
        return 0.002 + 0.15 * math.dist(one, other)

    digests = [bytes([block]) * 32 for block in range(BLOCKS)]
    offers = []
    for number, (identity, span) in enumerate(zip(identities, spans, strict=True)):
        following = [other for other in range(PEERS) if spans[other].start <= span.end < spans[other].end]
        following = random.sample(following, min(12, len(following)))
        rtts = sorted((apart_s(places[number], places[other]), other) for other in following)[:8]
        server = ServerRecord(
            seq=1,
            expires=1.0,
            model=MODEL,
            span=span,
            state="online",
            dtype="bfloat16",
            quantization="none",
            codecs=("exact",),
            throughput=random.uniform(200, 5000),
            free_tokens=random.choice([0, 5000, 60000]),
            max_length=8192,
            rtts=tuple((identities[other].peer_id, rtt_s) for rtt_s, other in rtts),
            block_roots=block_roots(span, digests[span.start : span.end]),
        )
        offers.append(Offer(identity.peer_id, server, (), record))
    known = random.sample(range(PEERS), 60)
    return offers, {identities[number].peer_id: apart_s(places[number], (0.5, 0.5)) for number in known}


def least_ms(work: Callable[[], object]) -> float:
    """Return the least CPU time that `work` took."""
    times = []
    for _ in range(REPEATS):
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return min(times) * 1000


def plan(given: Sequence[Offer] | OfferTable, blocks: Span, needs: ChainNeeds) -> object:
    return plan_chain(given, blocks, needs=needs, random=Random(1))


def main() -> None:
    print("| spans | cold | again | one hop | pass of 64 |\n|---|---|---|---|---|")
    for shortest, longest in ((2, 8), (4, 32), (16, 128)):
        offers, rtts_s = make_offers(shortest, longest, Random(1))
        table, whole = OfferTable(offers), Span(0, BLOCKS)

        needs = ChainNeeds(rtts_s, tokens=100, position_bytes=8192)
        of_a_pass = replace(needs, positions=256, requests=64)
        works: list[Callable[[], object]] = [
            partial(plan, offers, whole, needs),
            partial(plan, table, whole, needs),
            partial(plan, table, Span(60, 68), needs),
            partial(plan, table, whole, of_a_pass),
        ]
        print(f"| {shortest} to {longest} blocks |", " | ".join(f"{least_ms(work):.1f}" for work in works), "|")


if __name__ == "__main__":
    main()
