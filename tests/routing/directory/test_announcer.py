from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import trio

from peerd.protocol.identity import Identity
from peerd.protocol.records.envelope import (
    Announcement,
    PeerRecord,
    ServerRecord,
    SignedRecord,
    VerifiedRecord,
    open_record,
    sign_record,
)
from peerd.protocol.records.keys import keys_of
from peerd.protocol.span import Span
from peerd.routing.dht.record_sets import addresses_of, newest, servers_of
from peerd.routing.directory.announcer import FEW_HOLDERS, MIN_PERIOD_S, OTHERS_PERIOD_S, RETRY_S, TTL_S, Announcer

MODEL = bytes(range(32))
MakeServer = Callable[..., ServerRecord]
MakePeer = Callable[..., PeerRecord]
Network = Any


@dataclass
class Sink:
    """Notes what is put, and when."""

    now: Callable[[], float]
    replicas: int = 20
    puts: list[tuple[float, list[VerifiedRecord]]] = field(default_factory=list)

    async def put(self, *records: SignedRecord) -> int:
        await trio.lowlevel.checkpoint()
        opened = [open_record(record, now=self.now()) for record in records]
        self.puts.append((trio.current_time(), opened))
        return self.replicas

    @property
    def records(self) -> list[VerifiedRecord]:
        return [record for _, records in self.puts for record in records]

    @property
    def bodies(self) -> list[Any]:
        """The bodies of all records; a test knows which kind it announced."""
        return [record.body for record in self.records]


@dataclass
class Memory:
    seq: int = 0

    def load(self) -> int:
        return self.seq

    async def save(self, seq: int) -> None:
        await trio.lowlevel.checkpoint()
        self.seq = seq


class Setup:
    """An announcer, and what it announces."""

    def __init__(self, now: Callable[[], float], *bodies: Announcement, seq: int = 0) -> None:
        self.identity = Identity.from_seed(bytes(32))
        self.sink = Sink(now)
        self.memory = Memory(seq)
        self.bodies = list(bodies)
        self.announcer = Announcer(self.identity, self.sink, self.memory, lambda: self.bodies, now)

    def valid_at(self, key: bytes, now: float) -> list[ServerRecord]:
        """What a reader believes that has seen every record ever stored under `key`."""
        under = [record for record in self.sink.records if key in keys_of(record.body, record.peer_id)]
        return [r.body for r in newest(under) if r.body.expires > now and isinstance(r.body, ServerRecord)]


async def test_records_are_renewed_long_before_they_expire(
    unix_now: Callable[[], float], server_body: MakeServer, peer_body: MakePeer
) -> None:
    setup = Setup(unix_now, server_body(), peer_body())
    with trio.move_on_after(10 * TTL_S):
        await setup.announcer.run()
    assert [at for at, _ in setup.sink.puts] == [number * TTL_S / 3 for number in range(30)]
    assert all("server" in {record.kind for record in records} for _, records in setup.sink.puts)
    said = [at for at, records in setup.sink.puts if "peer" in {record.kind for record in records}]
    assert said == [number * OTHERS_PERIOD_S for number in range(10)]
    seqs = [record.body.seq for record in setup.sink.records]
    assert seqs == sorted(set(seqs))


async def test_where_few_hold_what_we_say_all_of_it_is_said_each_time(
    unix_now: Callable[[], float], server_body: MakeServer, peer_body: MakePeer
) -> None:
    setup = Setup(unix_now, server_body(), peer_body())
    setup.sink.replicas = FEW_HOLDERS - 1
    with trio.move_on_after(10 * TTL_S):
        await setup.announcer.run()
    for _, records in setup.sink.puts:
        assert {record.kind for record in records} == {"server", "peer"}


async def test_new_addresses_are_said_at_once(
    unix_now: Callable[[], float], server_body: MakeServer, peer_body: MakePeer
) -> None:
    setup = Setup(unix_now, server_body(), peer_body())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setup.announcer.run)
        await trio.sleep(5)
        setup.bodies[1] = peer_body(addresses=("/ip4/10.0.0.9/tcp/1/ws",))
        setup.announcer.announce_soon()
        await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    assert setup.sink.bodies[-1].addresses == ("/ip4/10.0.0.9/tcp/1/ws",)


async def test_what_is_announced_is_asked_for_each_time_and_soon_after_a_change(
    unix_now: Callable[[], float], server_body: MakeServer
) -> None:
    setup = Setup(unix_now, server_body(free_tokens=10))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setup.announcer.run)
        await trio.sleep(5)
        setup.bodies = [server_body(free_tokens=3)]
        setup.announcer.announce_soon()
        await trio.sleep(0.1)
        assert [body.free_tokens for body in setup.sink.bodies] == [10, 3]
        for _ in range(100):
            setup.announcer.announce_soon()
            await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    # However often something changes.
    times = [at for at, _ in setup.sink.puts]
    assert all(later - earlier >= MIN_PERIOD_S for earlier, later in pairwise(times))


async def test_the_first_span_is_announced_at_once_and_waiters_learn_it(
    unix_now: Callable[[], float], server_body: MakeServer
) -> None:
    setup = Setup(unix_now)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setup.announcer.run)
        await trio.sleep(0.5)
        assert not setup.sink.puts
        setup.bodies = [server_body()]
        setup.announcer.announce_soon()
        await setup.announcer.wait_announced()
        assert [at for at, _ in setup.sink.puts] == [0.5]
        setup.bodies = [server_body(free_tokens=1)]
        setup.announcer.announce_soon()
        await setup.announcer.wait_announced()
        assert [at for at, _ in setup.sink.puts] == [0.5, 0.5 + MIN_PERIOD_S]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("by", ["its state", "its span", "coming", "going"])
async def test_a_span_that_changes_by_more_than_its_figures_is_announced_at_once(
    unix_now: Callable[[], float], server_body: MakeServer, by: str
) -> None:
    first, other = server_body(state="joining"), server_body(slot=1, span=Span(30, 40))
    after = {
        "its state": [server_body(), other],
        "its span": [server_body(state="joining", span=Span(5, 9)), other],
        "coming": [first, other, server_body(slot=2)],
        "going": [first],
    }
    setup = Setup(unix_now, first, other)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setup.announcer.run)
        await trio.sleep(0.5)
        # Figures alone wait, and hold up nothing else.
        setup.bodies = [first, replace(other, free_tokens=1)]
        setup.announcer.announce_soon()
        await trio.sleep(0.1)
        setup.bodies = list(after[by])
        setup.announcer.announce_soon()
        await trio.sleep(0.1)
        assert sorted({at for at, _ in setup.sink.puts}) == [0, 0.6]
        # Once: what is left to say waits again.
        for _ in range(100):
            setup.announcer.announce_soon()
            await trio.sleep(0.01)
        assert sorted({at for at, _ in setup.sink.puts}) == [0, 0.6]
        nursery.cancel_scope.cancel()


async def test_an_announcement_that_reached_nobody_is_repeated_soon(
    unix_now: Callable[[], float], server_body: MakeServer
) -> None:
    setup = Setup(unix_now, server_body())
    setup.sink.replicas = 0
    with trio.move_on_after(RETRY_S * 2.5):
        await setup.announcer.run()
    assert [at for at, _ in setup.sink.puts] == [0, RETRY_S, 2 * RETRY_S]


async def test_leaving_withdraws_every_span_for_as_long_as_copies_live(
    unix_now: Callable[[], float], server_body: MakeServer, peer_body: MakePeer
) -> None:
    setup = Setup(unix_now, server_body(), server_body(slot=1, span=Span(30, 40)), peer_body())
    await setup.announcer.announce()
    await trio.sleep(7)
    await setup.announcer.leave()
    _, offline = setup.sink.puts[-1]
    assert [(body.slot, body.state) for body in setup.sink.bodies[-len(offline) :]] == [(0, "offline"), (1, "offline")]
    for old in setup.sink.puts[0][1][:2]:
        for new in offline:
            assert new.body.expires >= old.body.expires
            assert new.body.seq > old.body.seq
    puts = len(setup.sink.puts)
    await setup.announcer.leave()
    assert len(setup.sink.puts) == puts


async def test_a_span_that_moves_leaves_nothing_behind(unix_now: Callable[[], float], server_body: MakeServer) -> None:
    setup = Setup(unix_now, server_body(span=Span(0, 20)))
    await setup.announcer.announce()
    setup.bodies = [server_body(span=Span(20, 40))]
    await trio.sleep(20)
    await setup.announcer.announce()
    shards = [servers_of(MODEL, shard).key for shard in range(3)]
    assert [body.state for body in setup.valid_at(shards[0], unix_now())] == ["offline"]
    for shard in shards[1:]:
        assert [str(body.span) for body in setup.valid_at(shard, unix_now())] == ["20:40"]


async def test_a_span_that_is_served_no_more_is_withdrawn(
    unix_now: Callable[[], float], server_body: MakeServer
) -> None:
    setup = Setup(unix_now, server_body(), server_body(slot=1))
    await setup.announcer.announce()
    setup.bodies = setup.bodies[:1]
    await setup.announcer.announce()
    states = {body.slot: body.state for body in setup.valid_at(servers_of(MODEL, 0).key, unix_now())}
    assert states == {0: "online", 1: "offline"}


async def test_no_seq_is_used_again_after_a_restart_with_a_clock_set_back(
    unix_now: Callable[[], float], server_body: MakeServer
) -> None:
    before = Setup(unix_now, server_body())
    await before.announcer.announce()
    after = Setup(lambda: unix_now() - 50, server_body(), seq=before.memory.seq)
    await after.announcer.announce()
    assert after.sink.records[0].body.seq > before.sink.records[0].body.seq
    assert after.memory.seq == after.sink.records[0].body.seq


async def test_a_seq_is_kept_before_it_is_published(unix_now: Callable[[], float], server_body: MakeServer) -> None:
    setup = Setup(unix_now, server_body())

    async def fail(_: int) -> None:
        raise OSError("disk full")

    setup.memory.save = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(OSError, match="disk full"):
        await setup.announcer.announce()
    assert setup.sink.puts == []


async def test_a_stopped_peer_is_gone_at_once_and_a_crashed_one_within_one_lifetime(
    network: Network, unix_now: Callable[[], float], server_body: MakeServer
) -> None:
    stopping, crashing, *others = await network.add_joined(12)
    setups = {}
    for peer in (stopping, crashing):
        announcer = Announcer(peer.identity, peer.dht, Memory(), lambda: [server_body()], unix_now)
        setups[peer.peer_id] = announcer

    async def seen() -> dict[str, str]:
        found = await others[4].dht.get(servers_of(MODEL, 0))
        return {record.peer_id: record.body.state for record in found}

    with trio.CancelScope() as life:
        async with trio.open_nursery() as nursery:
            for announcer in setups.values():
                nursery.start_soon(announcer.run)
            await trio.sleep(5 * TTL_S)
            assert await seen() == {stopping.peer_id: "online", crashing.peer_id: "online"}
            life.cancel()
    network.kill(crashing)
    await setups[stopping.peer_id].leave()
    network.kill(stopping)
    assert await seen() == {stopping.peer_id: "offline", crashing.peer_id: "online"}
    # Another peer kept what the stopped peer had signed, and brings it back.
    for peer in others:
        replay = sign_record(stopping.identity, replace(server_body(), seq=1, expires=unix_now() + 30))
        await peer.dht.put(replay)
    assert (await seen())[stopping.peer_id] == "offline"
    await trio.sleep(TTL_S)
    assert await seen() == {}


async def test_a_peers_addresses_are_found_for_as_long_as_it_runs(
    network: Network, unix_now: Callable[[], float], peer_body: MakePeer
) -> None:
    peers = await network.add_joined(5)
    announcer = Announcer(peers[0].identity, peers[0].dht, Memory(), lambda: [peer_body()], unix_now)
    with trio.move_on_after(7 * TTL_S):
        await announcer.run()
    assert len(await peers[3].dht.get(addresses_of(peers[0].peer_id))) == 1
