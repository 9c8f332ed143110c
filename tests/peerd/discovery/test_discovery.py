"""Discovery over real connections in a network in memory."""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import trio

from peerd.client.finding.finder import SwarmFinder
from peerd.discovery.dht_streams import ANSWER_DEADLINE_S
from peerd.discovery.discovery import JOIN_WAIT_S, LEAVE_S, REFRESH_S, Discovery, open_discovery
from peerd.discovery.prober import RttProber
from peerd.discovery.state_files import Write, write_durably
from peerd.net.connections import Connections, open_connections
from peerd.net.containment import Containment
from peerd.net.dial_policy import ANYWHERE, DialPolicy, DialRules
from peerd.net.transport import MessageChannel
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import InvalidRequest, NoChain, StreamReset
from peerd.protocol.identity import Identity
from peerd.protocol.messages.session import Failure
from peerd.protocol.records.envelope import ServerRecord
from peerd.protocol.span import Span
from peerd.routing.chains.rules import ChainRules
from peerd.routing.clock import SwarmClock
from peerd.routing.dht.messages import DHT_PROTOCOL, Ping
from peerd.routing.dht.record_sets import servers_of
from peerd.routing.directory.announcer import TTL_S
from peerd.routing.reach.verdict import Whereabouts
from peerd.spans.neighbours import Neighbours
from peerd.testing.network import MemoryNetwork, MemoryTransport
from peerd.trio_tools import Watched

EPOCH = 1_800_000_000.0
MODEL = bytes(range(32))


def identity(number: int) -> Identity:
    return Identity.from_seed(number.to_bytes(32, "big"))


def body(**fields: object) -> ServerRecord:
    defaults: dict[str, object] = {
        "seq": 0,
        "expires": 0.0,
        "model": MODEL,
        "span": Span(0, 4),
        "state": "online",
        "dtype": "float32",
        "quantization": "none",
        "codecs": ("exact",),
        "throughput": 100.0,
        "free_tokens": 4096,
        "max_length": 2048,
    }
    return ServerRecord(**{**defaults, **fields})


async def write_at_once(path: Path, text: str) -> None:
    """The clock of the tests would not wait for a thread."""
    write_durably(path, text)


@dataclass
class NotingTransport:
    """Notes what is dialled, by host."""

    transport: MemoryTransport
    dialled: dict[str, list[Multiaddr]]

    async def dial(self, address: Multiaddr, tasks: trio.Nursery, policy: DialPolicy = ANYWHERE) -> MessageChannel:
        if policy.of([address]):
            self.dialled.setdefault(self.transport.host, []).append(address)
        return await self.transport.dial(address, tasks, policy)

    async def dial_from_own_port(self, address: Multiaddr, tasks: trio.Nursery) -> MessageChannel:
        return await self.transport.dial_from_own_port(address, tasks)

    def expecting(self, address: Multiaddr) -> AbstractContextManager[object]:
        return self.transport.expecting(address)

    async def meet(self, address: Multiaddr, tasks: trio.Nursery, *, as_server: bool) -> MessageChannel:
        return await self.transport.meet(address, tasks, as_server=as_server)

    async def listen(
        self,
        address: Multiaddr,
        handler: Callable[[MessageChannel], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[Multiaddr],
    ) -> None:
        await self.transport.listen(address, handler, task_status=task_status)


@dataclass
class Swarm:
    """Opens peers; the first is the bootstrap peer for all. The network is 10.0.0.0/8."""

    network: MemoryNetwork = field(default_factory=lambda: MemoryNetwork(latency_s=0.01))
    bootstrap: tuple[Multiaddr, ...] = ()
    dialled: dict[str, list[Multiaddr]] = field(default_factory=dict)

    @asynccontextmanager
    async def open(
        self,
        number: int,
        *,
        client: bool = False,
        state_dir: Path | None = None,
        write: Write = write_at_once,
        bootstrap: tuple[Multiaddr, ...] | None = None,
        ahead_s: float = 0.0,
        containment: Containment | None = None,
    ) -> AsyncIterator[tuple[Connections, Discovery]]:
        def now() -> float:
            return EPOCH + trio.current_time() + ahead_s

        host = f"10.0.0.{number}"
        listen = () if client else (Multiaddr.parse(f"/ip4/{host}/tcp/31330/ws"),)
        who = identity(number)
        joined = self.bootstrap if bootstrap is None else bootstrap
        where = Watched(Whereabouts.at(listen))
        # As a daemon sets it.
        strangers = DialPolicy(lambda: (*joined, *where.value.contacts))
        async with (
            open_connections(
                who,
                transport=NotingTransport(self.network.transport(host), self.dialled),
                listen=listen,
                handlers={},
                dial_rules=DialRules(strangers=strangers),
                now=now,
                containment=containment,
            ) as connections,
            open_discovery(
                connections,
                who,
                joined,
                state_dir=state_dir,
                write=write,
                random=Random(number),
                clock=SwarmClock(now),
                where=where,
            ) as discovery,
        ):
            if not self.bootstrap and not client:
                self.bootstrap = (listen[0].with_peer(who.peer_id),)
            yield connections, discovery


@pytest.fixture
def swarm() -> Swarm:
    return Swarm()


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(300):
        while not condition():
            await trio.sleep(0.1)


async def test_a_client_finds_the_servers_and_their_addresses(swarm: Swarm) -> None:
    async with AsyncExitStack() as stack:
        for number in range(1, 6):
            _, discovery = await stack.enter_async_context(swarm.open(number))
            if number > 1:
                spans = [body(span=Span(4 * number, 4 * number + 8))]
                discovery.announce_from(lambda spans=spans: spans)
        _, client = await stack.enter_async_context(swarm.open(9, client=True))
        await trio.sleep(3)
        offers = await client.directory.servers(MODEL, 40)
        assert sorted(str(offer.span) for offer in offers) == ["12:20", "16:24", "20:28", "8:16"]
        for offer in offers:
            number = offer.span.start // 4
            assert offer.peer_id == identity(number).peer_id
            assert [str(a) for a in offer.addresses] == [f"/ip4/10.0.0.{number}/tcp/31330/ws/p2p/{offer.peer_id}"]
        for _, discovery in [await stack.enter_async_context(swarm.open(7))]:
            assert identity(9).peer_id not in {contact.peer_id for contact in discovery.dht.contacts}


async def test_a_peer_that_leaves_is_gone_at_once(swarm: Swarm) -> None:
    async with swarm.open(1), swarm.open(2) as (_, reader):
        async with swarm.open(3) as (_, server):
            server.announce_from(lambda: [body()])
            await trio.sleep(3)
            assert len(await reader.directory.servers(MODEL, 4)) == 1
            started = trio.current_time()
        assert trio.current_time() - started < 2
        assert await reader.directory.servers(MODEL, 4, max_age_s=0) == []
        (record,) = await reader.dht.get(servers_of(MODEL, 0))
        assert isinstance(record.body, ServerRecord)
        assert record.body.state == "offline"


async def test_what_peers_gave_is_remembered_over_a_restart(swarm: Swarm, tmp_path: Path) -> None:
    async with swarm.open(1):
        async with swarm.open(2, state_dir=tmp_path, write=write_at_once) as (_, discovery):
            assert discovery.contributions.weight(identity(7).peer_id) == 1
            # What a client notes when a session was answered.
            discovery.track_record.succeeded(identity(7).peer_id)
            given = discovery.contributions.weight(identity(7).peer_id)
            assert given > 1
        async with swarm.open(2, state_dir=tmp_path, write=write_at_once) as (_, discovery):
            assert discovery.contributions.weight(identity(7).peer_id) == pytest.approx(given, rel=0.01)


async def test_a_server_that_is_reached_for_long_is_seen_to_serve(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peerd.routing.failures.contributions.SERVED_FOR_S", 60.0)
    async with swarm.open(1), swarm.open(2) as (_, server), swarm.open(3) as (connections, reader):
        server.announce_from(lambda: [body()])
        who = identity(2).peer_id
        await trio.sleep(3)
        await connections.connect(who, (await reader.directory.servers(MODEL, 4))[0].addresses)
        await trio.sleep(50)
        assert reader.contributions.weight(who) == 1
        await reader.directory.servers(MODEL, 4)
        await trio.sleep(20)
        assert reader.contributions.weight(who) > 1
        assert reader.contributions.weight(identity(1).peer_id) == 1


async def test_a_peer_that_ends_with_an_error_still_says_goodbye(swarm: Swarm) -> None:
    async with swarm.open(1), swarm.open(2) as (_, reader):

        async def fail() -> None:
            async with swarm.open(3) as (_, server):
                server.announce_from(lambda: [body()])
                await trio.sleep(3)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        assert await reader.directory.servers(MODEL, 4) == []


async def test_a_peer_whose_connections_were_cancelled_with_it_ends_soon(swarm: Swarm) -> None:
    async with swarm.open(1), swarm.open(2):
        with trio.move_on_after(10) as scope:
            async with swarm.open(3) as (_, server):
                server.announce_from(lambda: [body()])
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert trio.current_time() < 10 + LEAVE_S + 1


async def test_what_changes_is_announced_soon(swarm: Swarm) -> None:
    async with swarm.open(1), swarm.open(2) as (_, reader), swarm.open(3) as (_, server):
        free = 100
        server.announce_from(lambda: [body(free_tokens=free)])
        await trio.sleep(3)
        free = 7
        server.announce_soon()
        await trio.sleep(3)
        (offer,) = await reader.directory.servers(MODEL, 4)
        assert offer.record.free_tokens == 7


async def test_the_swarm_is_joined_as_soon_as_its_bootstrap_peer_wakes(swarm: Swarm) -> None:
    sleeping = Multiaddr.parse(f"/ip4/10.0.0.1/tcp/31330/ws/p2p/{identity(1).peer_id}")
    started = trio.current_time()
    async with swarm.open(2, bootstrap=(sleeping,)) as (_, early):
        assert trio.current_time() - started <= JOIN_WAIT_S
        early.announce_from(lambda: [body()])
        assert early.dht.contacts == []
        await trio.sleep(100)
        async with swarm.open(1, bootstrap=()) as (_, bootstrap):
            with trio.fail_after(80):
                await until(lambda: early.dht.contacts)
            # The announcement that no other peer had got reaches the others now.
            await trio.sleep(3)
            assert len(await bootstrap.directory.servers(MODEL, 4)) == 1


async def test_a_peer_alone_starts_at_once(swarm: Swarm) -> None:
    started = trio.current_time()
    async with swarm.open(1):
        assert trio.current_time() - started < 0.1


async def test_the_peers_known_before_are_asked_after_a_restart(swarm: Swarm, tmp_path: Path) -> None:
    async with swarm.open(1, bootstrap=()) as (_, _), swarm.open(2):
        async with swarm.open(3, state_dir=tmp_path / "new") as (_, before):
            assert len(before.dht.contacts) == 2
        async with swarm.open(3, state_dir=tmp_path / "new", bootstrap=()) as (_, after):
            assert {c.peer_id for c in after.dht.contacts} == {identity(1).peer_id, identity(2).peer_id}


async def test_no_seq_is_used_twice_over_a_restart_with_a_clock_set_back(swarm: Swarm, tmp_path: Path) -> None:
    async with swarm.open(1), swarm.open(2) as (_, reader):
        async with swarm.open(3, state_dir=tmp_path) as (_, server):
            server.announce_from(lambda: [body()])
            await trio.sleep(3)
        async with swarm.open(3, state_dir=tmp_path, ahead_s=-20) as (_, server):
            server.announce_from(lambda: [body()])
            await trio.sleep(3)
            assert len(await reader.directory.servers(MODEL, 4)) == 1


@pytest.mark.parametrize("text", ["", "{", '{"version": 3}', json.dumps({"version": 1, "contacts": [1]})])
async def test_a_damaged_state_costs_only_a_slower_start(swarm: Swarm, tmp_path: Path, text: str) -> None:
    (tmp_path / "contacts.json").write_text(text)
    (tmp_path / "seq").write_text(text)
    async with swarm.open(1), swarm.open(2, state_dir=tmp_path) as (_, discovery):
        assert len(discovery.dht.contacts) == 1
    assert json.loads((tmp_path / "contacts.json").read_text())["version"] == 1


async def test_a_full_disk_costs_no_announcement(swarm: Swarm, tmp_path: Path) -> None:
    async def fail(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with (
        swarm.open(1),
        swarm.open(2) as (_, reader),
        swarm.open(3, state_dir=tmp_path, write=fail) as (_, server),
    ):
        server.announce_from(lambda: [body()])
        await trio.sleep(2 * REFRESH_S)
        assert len(await reader.directory.servers(MODEL, 4)) == 1


async def test_a_task_that_fails_starts_again_and_the_others_go_on(swarm: Swarm) -> None:
    calls = 0

    def spans() -> list[ServerRecord]:
        nonlocal calls
        calls += 1
        if calls <= 2:
            raise ZeroDivisionError
        return [body()]

    containment = Containment(is_strict=False)
    async with (
        swarm.open(1),
        swarm.open(2) as (_, reader),
        swarm.open(3, containment=containment) as (_, server),
    ):
        server.announce_from(spans)
        await trio.sleep(1 + 2 + 1)
        assert len(await reader.directory.servers(MODEL, 4)) == 1
        assert containment.counts == {"announcing: ZeroDivisionError": 2}


async def test_a_disk_that_hangs_costs_no_announcement(swarm: Swarm, tmp_path: Path) -> None:
    async def hang(path: Path, text: str) -> None:
        await trio.sleep_forever()

    async with (
        swarm.open(1),
        swarm.open(2) as (_, reader),
        swarm.open(3, state_dir=tmp_path, write=hang) as (_, server),
    ):
        server.announce_from(lambda: [body()])
        await trio.sleep(2 * REFRESH_S)
        assert len(await reader.directory.servers(MODEL, 4)) == 1


async def test_the_clock_follows_the_swarms(swarm: Swarm) -> None:
    async with AsyncExitStack() as stack:
        for number in range(1, 5):
            await stack.enter_async_context(swarm.open(number))
        _, late = await stack.enter_async_context(swarm.open(5, ahead_s=-100))
        await trio.sleep(1)
        assert abs(late.clock() - (EPOCH + trio.current_time())) < 0.1
        late.announce_from(lambda: [body()])
        _, reader = await stack.enter_async_context(swarm.open(6))
        await trio.sleep(5)
        assert len(await reader.directory.servers(MODEL, 4)) == 1


async def test_round_trips_of_connections_are_known(swarm: Swarm) -> None:
    async with swarm.open(1), swarm.open(2) as (_, discovery):
        await until(lambda: discovery.track_record.rtt_s(identity(1).peer_id) is not None)
        rtt_s = discovery.track_record.rtt_s(identity(1).peer_id)
        assert rtt_s == pytest.approx(0.02, abs=0.01)


async def test_delays_to_possible_next_hops_go_out_with_the_next_announcement_and_cause_none(swarm: Swarm) -> None:
    async with (
        swarm.open(1),
        swarm.open(2) as (connections, server),
        swarm.open(3) as (_, follower),
        swarm.open(4, client=True) as (_, client),
        trio.open_nursery() as nursery,
    ):
        own, record = identity(2).peer_id, server.track_record
        prober = RttProber(connections, record, server.may_dial)
        neighbours = Neighbours(own, server.directory, record, prober, Random(1), ChainRules(), lambda: [body()])
        neighbours.serves(MODEL, 8)
        server.announce_from(lambda: neighbours.filled([body()]))
        follower.announce_from(lambda: [body(span=Span(4, 8))])
        nursery.start_soon(neighbours.run)
        records: dict[int, ServerRecord] = {}

        async def look() -> None:
            offers = await client.directory.servers(MODEL, 8, max_age_s=0.0)
            records.update((offer.record.seq, offer.record) for offer in offers if offer.peer_id == own)

        for second in range(300):
            # The line to the follower becomes longer and longer.
            swarm.network.set_latency("10.0.0.2", "10.0.0.3", 0.01 + second * 0.001)
            await look()
            await trio.sleep(1)
        said = [dict(record.rtts) for _, record in sorted(records.items())]
        assert 300 / (TTL_S / 3) - 2 <= len(said) <= 300 / (TTL_S / 3) + 4
        assert said[-1].keys() == {identity(3).peer_id}
        assert said[-1][identity(3).peer_id] > 0.1
        nursery.cancel_scope.cancel()


async def test_a_peer_that_is_cut_off_is_forgotten_and_found_again(swarm: Swarm) -> None:
    async with swarm.open(1), swarm.open(2) as (_, two), swarm.open(3) as (_, three):
        three.announce_from(lambda: [body()])
        await trio.sleep(3)
        for other in ("10.0.0.1", "10.0.0.2"):
            swarm.network.partition("10.0.0.3", other)
        await trio.sleep(90)
        assert await two.directory.servers(MODEL, 4) == []
        for other in ("10.0.0.1", "10.0.0.2"):
            swarm.network.heal("10.0.0.3", other)
        await trio.sleep(2 * REFRESH_S)
        assert len(await two.directory.servers(MODEL, 4)) == 1


async def test_a_peer_that_lost_all_connections_looks_for_the_others(swarm: Swarm) -> None:
    async with swarm.open(1), swarm.open(2), swarm.open(3, client=True) as (connections, _):
        assert connections.live
        for other in ("10.0.0.1", "10.0.0.2"):
            swarm.network.partition("10.0.0.3", other)
        await trio.sleep(90)
        assert not connections.live
        for other in ("10.0.0.1", "10.0.0.2"):
            swarm.network.heal("10.0.0.3", other)
        await until(lambda: len(connections.live) == 2)


async def test_a_malformed_question_is_answered_with_what_is_wrong(swarm: Swarm) -> None:
    async with swarm.open(1), swarm.open(2) as (connections, discovery):
        stream = await connections.open_stream(identity(1).peer_id, DHT_PROTOCOL)
        async with stream:
            await stream.send({"type": "find_node", "key": b"short"})
            answer = await stream.receive()
        error = Failure.from_header(answer.header).error
        assert isinstance(error, InvalidRequest)
        assert "key" in str(error)
        # No peer is dropped for that.
        assert identity(1).peer_id in connections.live
        assert len(discovery.dht.contacts) == 1


async def test_a_stream_that_asks_nothing_is_ended(swarm: Swarm) -> None:
    async with swarm.open(1), swarm.open(2) as (connections, _):
        for finish in (True, False):
            stream = await connections.open_stream(identity(1).peer_id, DHT_PROTOCOL)
            if finish:
                stream.finish()
            with trio.fail_after(2 * ANSWER_DEADLINE_S), pytest.raises(StreamReset):
                await stream.receive()


async def test_strangers_cannot_aim_us_at_our_own_machine(swarm: Swarm) -> None:
    async with swarm.open(1), swarm.open(2) as (connections, discovery), swarm.open(3) as (stranger, _):
        dialled = swarm.dialled["10.0.0.2"]
        before = len(dialled)
        claims = ("/ip4/127.0.0.1/tcp/22/ws", "/ip4/10.0.0.3/tcp/31330/ws")
        async with await stranger.open_stream(connections.peer_id, DHT_PROTOCOL) as stream:
            await stream.send(Ping(tuple(Multiaddr.parse(text) for text in claims)).to_header())
            await stream.receive()
        stranger.live[connections.peer_id].close()
        await trio.sleep(1)
        assert claims[0] not in {str(a) for contact in discovery.dht.contacts for a in contact.addresses}
        await discovery.dht.get(servers_of(MODEL, 0))
        assert {address.host for address in dialled[before:]} == {"10.0.0.3"}


async def test_a_bootstrap_address_needs_a_peer_id(swarm: Swarm) -> None:
    with pytest.raises(ValueError, match="/p2p/PEERID"):
        async with swarm.open(2, bootstrap=(Multiaddr.parse("/ip4/10.0.0.1/tcp/31330/ws"),)):
            pass


@pytest.mark.parametrize(("ahead_s", "said"), [(-3600, "1 h old"), (3600, "1 h ahead")])
async def test_a_server_with_a_wrong_clock_is_named_to_whoever_finds_nobody(
    swarm: Swarm, ahead_s: float, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with swarm.open(1, ahead_s=ahead_s) as (_, server), swarm.open(2, client=True) as (_, client):
        server.announce_from(lambda: [body()])
        await trio.sleep(20)
        finder = SwarmFinder(client.directory, client.track_record, MODEL, 4, Random(1))
        with pytest.raises(NoChain, match=f"{identity(1).peer_id}'s records are {said}: check its clock"):
            await finder.find(Span(0, 4), tokens=1, exclude=())
        # And whoever can do something about it.
        assert "is 1 h" in caplog.text
