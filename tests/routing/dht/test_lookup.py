from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
import trio
from kademlia.node import Node

from peerd.protocol.identity import Identity
from peerd.routing.dht.lookup import GIVE_UP_S, PATIENCE_S, Crawl
from peerd.routing.dht.table import Contact, PeerNode

NODES = [PeerNode(Contact(Identity.from_seed(number.to_bytes(32, "big")).peer_id)) for number in range(60)]
OWN = NODES[0]
TARGET = Node(bytes(20))
NEAREST = sorted(NODES[1:], key=TARGET.distance_to)


@dataclass
class Reply:
    nodes: list[PeerNode]


@dataclass
class World:
    """Peers that answer after a while with the peers that they know."""

    knows: dict[bytes, list[PeerNode]]
    delay_s: dict[bytes, float] = field(default_factory=dict)
    dead: set[bytes] = field(default_factory=set)
    asked: list[bytes] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    async def ask(self, node: PeerNode, target: Node) -> Reply | None:
        assert target is TARGET
        self.asked.append(node.id)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await trio.sleep(3.0 if node.id in self.dead else self.delay_s.get(node.id, 0.05))
        self.at_once -= 1
        return None if node.id in self.dead else Reply(self.knows.get(node.id, []))


def everybody_knows(random: Random) -> dict[bytes, list[PeerNode]]:
    """Each peer knows us, its neighbours, and some others."""
    return {n.id: [OWN, *sorted(NODES[1:], key=n.distance_to)[1:16], *random.sample(NODES, 6)] for n in NODES}


def crawl(world: World, start: list[PeerNode], *, quorum: int | None = None, ksize: int = 8) -> Crawl[Reply]:
    return Crawl(OWN, TARGET, start, world.ask, ksize=ksize, alpha=3, quorum=quorum)


@pytest.mark.parametrize("seed", range(5))
async def test_the_nearest_are_found_and_each_is_asked_once(seed: int) -> None:
    world = World(everybody_knows(Random(seed)))
    found = await crawl(world, NODES[20:22]).find()
    assert found == NEAREST[:8]
    assert len(world.asked) == len(set(world.asked)) < 40
    assert OWN.id not in world.asked
    assert world.most_at_once <= 3


async def test_a_failed_peer_is_neither_found_nor_asked_again() -> None:
    world = World(everybody_knows(Random(1)), dead={node.id for node in NEAREST[:5]})
    found = await crawl(world, NODES[20:22]).find()
    assert found == NEAREST[5:13]
    assert len(world.asked) == len(set(world.asked))


async def test_a_quorum_does_not_wait_for_the_dead() -> None:
    world = World(everybody_knows(Random(2)), dead={node.id for node in NEAREST[0:12:3]})
    started = trio.current_time()
    lookup = crawl(world, NODES[20:22], quorum=4)
    await lookup.find()
    assert trio.current_time() - started < 1.0
    answered = [node for node in NEAREST if node.id in lookup.replies]
    assert [node for node in NEAREST if node.id not in world.dead][:4] == answered[:4]
    # A peer that had enough time to answer and did not is under suspicion.
    assert {node.id for node in lookup.unanswered} <= world.dead


async def test_slow_peers_hold_up_no_asker() -> None:
    slow = NODES[20:23]
    world = World(everybody_knows(Random(3)), delay_s={node.id: 2.0 for node in slow})
    world.knows |= {slow[0].id: []}
    started = trio.current_time()
    await crawl(world, [*slow, NODES[30]], quorum=4).find()
    assert PATIENCE_S < trio.current_time() - started < 2 * PATIENCE_S + 0.5


async def test_a_slow_peers_answer_still_counts() -> None:
    world = World({NODES[20].id: [NEAREST[0]]}, delay_s={NODES[20].id: 0.9})
    assert await crawl(world, [NODES[20]]).find() == [NEAREST[0], NODES[20]]


async def test_fewer_peers_than_the_quorum_end_a_lookup_soon() -> None:
    world = World({}, dead={NODES[21].id})
    started = trio.current_time()
    await crawl(world, NODES[20:22], quorum=8).find()
    assert trio.current_time() - started == pytest.approx(GIVE_UP_S)


async def test_a_lookup_among_nobody_or_the_dead_ends() -> None:
    world = World({}, dead={node.id for node in NODES})
    assert await crawl(world, []).find() == []
    assert await crawl(world, NODES[20:30]).find() == []
    assert await crawl(world, NODES[20:30], quorum=8).find() == []
