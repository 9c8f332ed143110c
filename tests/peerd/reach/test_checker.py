"""Whether others can dial us, found out by real peers on a network in memory, with NATs and peers that lie."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import ip_address
from random import Random

import pytest
import trio
import trio.lowlevel

from peerd.net.connections import Connections, PeerConnection, Stream
from peerd.net.dial_policy import ANYWHERE, DialPolicy
from peerd.net.transport import MessageChannel
from peerd.peer import Peer, open_peer
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.hello import Hello
from peerd.protocol.errors import Overloaded, RemoteProtocolError, StreamReset, UnsupportedFeature
from peerd.protocol.identity import Identity
from peerd.protocol.messages.dialback import DIALBACK_PROTOCOL, Dialled, DialMe
from peerd.protocol.messages.session import Failure
from peerd.protocol.records.envelope import PeerRecord, ServerRecord
from peerd.protocol.span import Span
from peerd.reach.checker import SETTLE_S, ReachChecker
from peerd.reach.dialback import MAX_AT_ONCE, PAUSE_S, ask_to_be_dialled
from peerd.reach.relay_ledger import RelayLimits
from peerd.routing.reach.verdict import Reach
from peerd.testing.network import MemoryNetwork, MemoryTransport
from peerd.trio_tools import open_tasks

EPOCH = 1_800_000_000.0
PORT = 31330
# Peers on the internet, each in a network of its own; a router, and two machines behind it.
PUBLIC = ("5.1.1.1", "5.2.2.2", "5.3.3.3", "5.4.4.4", "5.5.5.5")
ROUTER = "6.6.6.6"
# The first of them.
NAME = "peer.example.org"
HOME, NEIGHBOUR = "192.168.1.2", "192.168.1.3"


@dataclass
class NotingTransport:
    """Notes which peer dials which address."""

    transport: MemoryTransport
    dialled: list[tuple[str, str]]

    async def dial(self, address: Multiaddr, tasks: trio.Nursery, policy: DialPolicy = ANYWHERE) -> MessageChannel:
        if policy.of([address]):
            self.dialled.append((self.transport.host, f"{address.host}:{address.port}"))
        if address.host == NAME:
            address = replace(address, kind="ip4", host=PUBLIC[0])
        return await self.transport.dial(address, tasks, policy)

    async def listen(
        self,
        address: Multiaddr,
        handler: Callable[[MessageChannel], object],
        *,
        task_status: trio.TaskStatus[Multiaddr],
    ) -> None:
        await self.transport.listen(address, handler, task_status=task_status)  # type: ignore[arg-type]


@dataclass
class World:
    """Opens peers; all join through those in `bootstrap`."""

    stack: AsyncExitStack
    network: MemoryNetwork = field(default_factory=lambda: MemoryNetwork(latency_s=0.01))
    bootstrap: tuple[Multiaddr, ...] = ()
    dialled: list[tuple[str, str]] = field(default_factory=list)
    ahead_s: float = 0.0

    def transport(self, host: str) -> NotingTransport:
        return NotingTransport(self.network.transport(host), self.dialled)

    async def open(self, host: str, *, listen: Sequence[str] | None = None, **options: object) -> Peer:
        at = [f"/ip4/{host}/tcp/{PORT}/ws"] if listen is None else listen
        opening = open_peer(
            Identity.from_seed(host.encode().ljust(32)),
            listen=at,
            bootstrap=self.bootstrap,
            transport=self.transport(host),
            now=lambda: EPOCH + trio.current_time() + self.ahead_s,
            **options,  # type: ignore[arg-type]
        )
        return await self.stack.enter_async_context(opening)

    async def internet(self, count: int) -> list[Peer]:
        """Public peers, which join through the first."""
        peers = [await self.open(PUBLIC[0])]
        self.bootstrap = peers[0].addresses
        peers += [await self.open(host) for host in PUBLIC[1:count]]
        self.bootstrap = tuple(address for peer in peers for address in peer.addresses)
        return peers

    async def at_home(self, host: str = HOME, **options: object) -> Peer:
        self.network.put_behind_nat(host, ROUTER)
        return await self.open(host, **options)  # type: ignore[arg-type]


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(stack)


async def until(condition: Callable[[], object], within_s: float = 300) -> None:
    with trio.fail_after(within_s):
        while not condition():
            await trio.sleep(0.1)


def reach(peer: Peer, expected: Reach) -> Callable[[], bool]:
    return lambda: peer.reachability.reach is expected


def hosts(addresses: Sequence[Multiaddr]) -> list[str]:
    return [address.host for address in addresses]


# What is found.


async def test_a_peer_behind_a_nat_finds_out_and_is_in_nobodys_table() -> None:
    async with world() as net:
        internet = await net.internet(3)
        peer = await net.at_home()
        await until(reach(peer, Reach.PRIVATE), within_s=15)
        assert peer.reachability.found.value.wants_relays
        assert peer.discovery.dht.addresses == ()
        # Its neighbours may dial it; its address is announced to no other peer.
        assert hosts(peer.addresses) == [HOME]
        await trio.sleep(200)
        for other in internet:
            assert peer.peer_id not in {contact.peer_id for contact in other.discovery.dht.contacts}
        assert peer.discovery.dht.contacts


async def test_a_peer_behind_a_forwarded_port_announces_where_it_is_seen() -> None:
    async with world() as net:
        internet = await net.internet(3)
        net.network.forward(ROUTER, PORT, HOME)
        peer = await net.at_home()
        await until(reach(peer, Reach.PUBLIC), within_s=15)
        assert not peer.reachability.found.value.wants_relays
        assert [str(address) for address in peer.discovery.dht.addresses] == [f"/ip4/{ROUTER}/tcp/{PORT}/ws"]
        assert hosts(peer.addresses) == [ROUTER, HOME]
        await until(
            lambda: all(
                any(c.peer_id == peer.peer_id and hosts(c.addresses) == [ROUTER] for c in other.discovery.dht.contacts)
                for other in internet
            )
        )
        stranger = await net.open("5.9.9.9", listen=[])
        await stranger.connections.connect(peer.peer_id, peer.addresses[:1])


async def test_a_public_peer_is_reached_at_its_own_address() -> None:
    async with world() as net:
        internet = await net.internet(3)
        await until(reach(internet[2], Reach.PUBLIC), within_s=15)
        assert hosts(internet[2].addresses) == [PUBLIC[2]]
        # The first peer dialled no peer that it could ask; but it was dialled.
        assert internet[0].reachability.reach is Reach.PUBLIC
        assert hosts(internet[0].discovery.dht.addresses) == [PUBLIC[0]]


async def test_a_dial_to_an_address_that_is_not_ours_proves_nothing() -> None:
    async with world() as net:
        net.network.forward(ROUTER, PORT, HOME)
        peer = await net.at_home()
        stranger = await net.open("5.9.9.9", listen=[])
        await stranger.connections.connect(peer.peer_id, [Multiaddr("ip4", ROUTER, PORT)])
        await trio.sleep(5)
        assert peer.connections.live
        assert peer.reachability.reach is Reach.UNKNOWN


async def test_a_firewalled_address_is_announced_no_more() -> None:
    async with world() as net:
        await net.internet(2)
        net.network.put_behind_nat("6.6.6.7", "6.6.6.7")
        peer = await net.open("6.6.6.7")
        assert hosts(peer.discovery.dht.addresses) == ["6.6.6.7"]
        await until(reach(peer, Reach.PRIVATE), within_s=15)
        assert peer.discovery.dht.addresses == ()
        assert peer.addresses == ()


@pytest.mark.parametrize("network", ["10.0.0", "127.0.0"])
async def test_a_swarm_in_a_private_range_stays_as_it_was(network: str) -> None:
    async with world() as net:
        first = await net.open(f"{network}.1")
        net.bootstrap = first.addresses
        second = await net.open(f"{network}.2")
        assert hosts(second.discovery.dht.addresses) == [f"{network}.2"]
        await until(reach(second, Reach.PUBLIC), within_s=15)
        assert hosts(second.discovery.dht.addresses) == [f"{network}.2"]
        assert hosts(second.addresses) == [f"{network}.2"]


@pytest.mark.parametrize("address", ["/dns4/peer.example.org/tcp/443/wss", "/ip4/10.9.9.9/tcp/443/ws"])
async def test_what_the_operator_announces_is_not_doubted(address: str) -> None:
    async with world() as net:
        await net.internet(2)
        peer = await net.at_home(announce=[address])
        await trio.sleep(100)
        assert peer.reachability.reach is Reach.PUBLIC
        assert [str(one) for one in peer.discovery.dht.addresses] == [address]
        assert [str(one.with_peer(None)) for one in peer.addresses] == [address]
        assert not [one for one in net.dialled if one[1].startswith(ROUTER)]


async def test_a_client_that_listens_nowhere_asks_nobody() -> None:
    async with world() as net:
        await net.internet(2)
        client = await net.open("5.9.9.9", listen=[])
        await trio.sleep(100)
        assert client.reachability.reach is Reach.UNKNOWN
        assert not [one for one in net.dialled if one[1].startswith("5.9.9.9")]


async def test_a_peer_on_loopback_only_is_told_that_nobody_can_dial_it() -> None:
    async with world() as net:
        await net.internet(2)
        peer = await net.at_home(listen=[f"/ip4/127.0.0.1/tcp/{PORT}/ws"])
        await until(reach(peer, Reach.PRIVATE), within_s=15)
        assert "loopback only" in peer.reachability.here.why
        assert hosts(peer.addresses) == ["127.0.0.1"]
        assert peer.discovery.dht.addresses == ()


async def test_before_the_first_dial_back_a_peer_behind_a_nat_is_a_client() -> None:
    async with world() as net:
        first = await net.open(PUBLIC[0])
        del first.connections.handlers[DIALBACK_PROTOCOL]
        net.bootstrap = first.addresses
        peer = await net.at_home()
        await trio.sleep(60)
        assert peer.reachability.reach is Reach.UNKNOWN
        assert peer.discovery.dht.addresses == ()
        # No judge can tell; relays should make it reachable meanwhile.
        assert peer.reachability.found.value.wants_relays


async def test_a_peer_seen_by_proxies_only_is_a_client_and_wants_relays() -> None:
    async with world() as net:
        first = await net.open(PUBLIC[0])
        say = partial(_hello_with, first.connections._hello_to, "127.0.0.1")
        first.connections._hello_to = say  # type: ignore[method-assign]
        net.bootstrap = first.addresses
        peer = await net.at_home()
        await trio.sleep(60)
        assert peer.reachability.here.observed == ()
        assert peer.discovery.dht.addresses == ()
        assert peer.reachability.found.value.wants_relays


async def test_that_a_swarm_is_on_the_internet_is_learnt_from_where_its_peers_are() -> None:
    async with world() as net:
        first = await net.open(PUBLIC[0])
        del first.connections.handlers[DIALBACK_PROTOCOL]
        net.bootstrap = (Multiaddr("dns4", NAME, PORT, peer_id=first.peer_id),)
        peer = await net.at_home()
        await trio.sleep(5)
        assert peer.discovery.dht.addresses == ()


async def test_neighbours_behind_one_nat_still_reach_each_other() -> None:
    async with world() as net:
        await net.internet(2)
        one, other = await net.at_home(), await net.at_home(NEIGHBOUR)
        for peer in (one, other):
            # They share their router's minute.
            await until(reach(peer, Reach.PRIVATE), within_s=2000)
        await other.connections.connect(one.peer_id, one.addresses)


async def test_a_private_peers_record_names_no_address_that_is_no_use() -> None:
    async with world() as net:
        internet = await net.internet(3)
        peer = await net.at_home()
        peer.discovery.announce_from(lambda: [_server_record()])
        await until(reach(peer, Reach.PRIVATE), within_s=15)
        await trio.sleep(10)
        record = await internet[1].discovery.directory.peer_record(peer.peer_id)
        assert record is not None
        body = PeerRecord.from_payload(record.payload)
        assert body.addresses == (f"/ip4/{HOME}/tcp/{PORT}/ws",)


def _server_record() -> ServerRecord:
    return ServerRecord(
        seq=0,
        expires=0.0,
        model=bytes(32),
        span=Span(0, 4),
        state="online",
        dtype="float32",
        quantization="none",
        codecs=("exact",),
        throughput=1.0,
        free_tokens=1,
        max_length=1,
    )


# Change.


async def test_reservations_at_relays_are_held_until_others_can_dial_us() -> None:
    async with world() as net:
        relay = await net.open(PUBLIC[0], relay=RelayLimits())
        net.bootstrap = relay.addresses
        await net.open(PUBLIC[1])
        peer = await net.at_home()
        keeping = peer.reachability.holding_reservations(peer.discovery.contacts, Random(1))
        await net.stack.enter_async_context(keeping)
        await until(lambda: relay.peer_id in peer.reservations.held, within_s=30)
        await trio.sleep(PAUSE_S)
        net.network.forward(ROUTER, PORT, HOME)
        peer.reachability.check_soon()
        await until(reach(peer, Reach.PUBLIC), within_s=20)
        await trio.sleep(1)
        assert not peer.reservations.held
        assert relay.relay is not None
        assert relay.relay.ledger.slots == 0


async def test_a_machine_that_moved_announces_the_addresses_that_it_has_now() -> None:
    async with world() as net:
        internet = await net.internet(2)
        here = [Multiaddr("ip4", HOME, PORT)]
        peer = await net.at_home()
        checker = ReachChecker(
            peer.connections,
            lambda: here,
            fixed=False,
            bootstrap=internet[0].addresses,
            random=Random(1),
            now=lambda: EPOCH + trio.current_time(),
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(checker.run)
            await until(lambda: checker.found.value.where.addresses == tuple(here), within_s=100)
            here[:] = [Multiaddr("ip4", "192.168.9.9", PORT)]
            checker.check_soon()
            await until(lambda: checker.found.value.where.addresses == tuple(here), within_s=100)
            nursery.cancel_scope.cancel()


async def test_a_port_that_is_forwarded_later_is_noticed_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "peerd.reach.checker")
    async with world() as net:
        await net.internet(3)
        peer = await net.at_home()
        heard: list[Reach] = []
        heard_by = await net.stack.enter_async_context(open_tasks())
        heard_by.start_soon(peer.reachability.found.follow, lambda found: heard.append(found.reach))
        await until(reach(peer, Reach.PRIVATE), within_s=15)
        await trio.sleep(500)
        net.network.forward(ROUTER, PORT, HOME)
        await until(reach(peer, Reach.PUBLIC), within_s=1500)
        await trio.lowlevel.checkpoint()
        assert heard[-2:] == [Reach.PRIVATE, Reach.PUBLIC]
    said = [record.getMessage() for record in caplog.records if HOME in record.getMessage() or ROUTER in record.message]
    assert len(said) == 2, said
    assert f"forward TCP port {PORT}" in said[0]
    assert "--announce" in said[0]
    assert "others can dial us" in said[1]


async def test_another_address_makes_all_that_was_proven_void_until_it_is_proven_anew() -> None:
    async with world() as net:
        await net.internet(3)
        net.network.forward(ROUTER, PORT, HOME)
        peer = await net.at_home()
        peer.discovery.announce_from(lambda: [_server_record()])
        await until(reach(peer, Reach.PUBLIC), within_s=15)
        # The provider gives the router another address; nothing is forwarded there.
        net.network.put_behind_nat(HOME, "7.7.7.7")
        for host in PUBLIC:
            net.network.disconnect(HOME, host)
        await until(lambda: ROUTER not in hosts(peer.addresses), within_s=200)
        await until(reach(peer, Reach.PRIVATE), within_s=200)
        assert peer.discovery.dht.addresses == ()


async def test_what_was_proven_elsewhere_is_not_announced_while_nobody_can_tell() -> None:
    async with world() as net:
        internet = await net.internet(3)
        net.network.forward(ROUTER, PORT, HOME)
        peer = await net.at_home()
        peer.discovery.announce_from(lambda: [_server_record()])
        await until(reach(peer, Reach.PUBLIC), within_s=15)
        for other in internet:
            del other.connections.handlers[DIALBACK_PROTOCOL]
        net.network.put_behind_nat(HOME, "7.7.7.7")
        for host in PUBLIC:
            net.network.disconnect(HOME, host)
        await until(reach(peer, Reach.UNKNOWN), within_s=200)
        assert hosts(peer.addresses) == [HOME]
        assert peer.discovery.dht.addresses == ()


def answer_slowly(judges: Sequence[Peer]) -> tuple[list[float], trio.Event]:
    """From now on they answer the peer at home once the event is set. The list: when they were asked."""
    asked: list[float] = []
    go_on = trio.Event()

    async def slowly(handler: Callable[[Stream], Awaitable[None]], stream: Stream) -> None:
        if stream.connection.remote_ip == ip_address(ROUTER):
            asked.append(trio.current_time())
            await go_on.wait()
        await handler(stream)

    for judge in judges:
        handlers = judge.connections.handlers
        handlers[DIALBACK_PROTOCOL] = partial(slowly, handlers[DIALBACK_PROTOCOL])
    return asked, go_on


async def test_news_that_come_while_others_are_asked_make_a_peer_ask_again() -> None:
    async with world() as net:
        asked, go_on = answer_slowly(await net.internet(3))
        peer = await net.at_home()
        await until(lambda: asked, within_s=30)
        peer.reachability.check_soon()
        go_on.set()
        await until(reach(peer, Reach.PRIVATE), within_s=15)
        first = asked[-1]
        await until(lambda: asked[-1] > first, within_s=15)


async def test_an_answer_about_an_address_that_was_left_meanwhile_proves_nothing() -> None:
    async with world() as net:
        internet = await net.internet(3)
        net.network.forward(ROUTER, PORT, HOME)
        asked, go_on = answer_slowly(internet)
        peer = await net.at_home()
        await until(lambda: asked, within_s=30)
        for judge, host in zip(internet, PUBLIC, strict=False):
            peer.reachability._checker._observed.note(judge.peer_id, ip_address(host), ip_address("7.7.7.7"))
        go_on.set()
        await trio.sleep(1)
        assert peer.reachability.reach is Reach.UNKNOWN
        assert ROUTER not in hosts(peer.addresses)


async def test_a_peer_that_slept_looks_again() -> None:
    async with world() as net:
        await net.internet(3)
        peer = await net.at_home()
        await until(reach(peer, Reach.PRIVATE), within_s=15)
        # Looks come after about 80, 240, 560 and 1200 s.
        await trio.sleep(800)
        net.network.forward(ROUTER, PORT, HOME)
        await trio.sleep(20)
        assert peer.reachability.reach is Reach.PRIVATE
        # Time goes on while we sleep.
        net.ahead_s = 3600.0
        await until(reach(peer, Reach.PUBLIC), within_s=20)


async def test_a_peer_that_was_cut_off_looks_again_when_it_is_back() -> None:
    async with world() as net:
        await net.internet(3)
        peer = await net.at_home()
        peer.discovery.announce_from(lambda: [_server_record()])
        await until(reach(peer, Reach.PRIVATE), within_s=15)
        await trio.sleep(PAUSE_S)
        net.network.forward(ROUTER, PORT, HOME)
        for connection in tuple(peer.connections.live.values()):
            connection.close()
        await trio.sleep(SETTLE_S)
        await until(reach(peer, Reach.PUBLIC), within_s=100)


async def test_questions_become_seldom_while_nothing_changes() -> None:
    async with world() as net:
        await net.internet(3)
        peer = await net.at_home()
        await until(reach(peer, Reach.PRIVATE), within_s=15)
        before = len(net.dialled)
        await trio.sleep(1800)
        # Two judges, three times.
        tried = [one for one in net.dialled[before:] if one[1] == f"{ROUTER}:{PORT}"]
        assert 2 <= len(tried) <= 8


# Judges that lie, and peers that would misuse us.


async def test_one_lying_judge_among_three_changes_nothing() -> None:
    async with world() as net:
        internet = await net.internet(3)

        async def lie(stream: Stream) -> None:
            async with stream:
                asked = DialMe.from_header((await stream.receive()).header)
                ip = stream.connection.remote_ip
                assert ip is not None
                await stream.send(Dialled(ip, ("reached",) * len(asked.ports)).to_header())

        internet[1].connections.handlers[DIALBACK_PROTOCOL] = lie
        peer = await net.at_home()
        await until(reach(peer, Reach.PRIVATE), within_s=60)


async def test_strangers_that_dial_us_are_neither_believed_nor_asked() -> None:
    async with world() as net:
        internet = await net.internet(3)
        peer = internet[2]
        await until(reach(peer, Reach.PUBLIC), within_s=15)
        asked = 0

        async def lie(stream: Stream) -> None:
            nonlocal asked
            asked += 1
            async with stream:
                await stream.send(Dialled(ip_address(PUBLIC[2]), ("silent",)).to_header())

        net.bootstrap = ()
        for number, sees in enumerate(["9.9.9.9"] * 6 + [PUBLIC[2]] * 2):
            stranger = await net.open(f"8.8.{number}.8", listen=[])
            say = partial(_hello_with, stranger.connections._hello_to, sees)
            stranger.connections._hello_to = say  # type: ignore[method-assign]
            stranger.connections.handlers[DIALBACK_PROTOCOL] = lie
            await stranger.connections.connect(peer.peer_id, peer.addresses)
            await trio.sleep(1)
            assert not peer.connections.live[stranger.peer_id].dialled
        for _ in range(3):
            await trio.sleep(PAUSE_S)
            peer.reachability.check_soon()
        assert [str(ip) for ip in peer.reachability.here.observed] == [PUBLIC[2]]
        assert peer.reachability.reach is Reach.PUBLIC
        assert not asked


def _hello_with(say: Callable[[PeerConnection], Hello], observed_ip: str, connection: PeerConnection) -> Hello:
    return replace(say(connection), observed_ip=observed_ip)


async def _ask(stranger: Connections, peer: Peer, header: dict[str, object]) -> Dialled:
    opened = stranger.open_stream(peer.peer_id, DIALBACK_PROTOCOL, addresses=peer.addresses, policy=ANYWHERE)
    async with await opened as stream:
        await stream.send(header)
        answer = (await stream.receive()).header
    if answer["type"] == Failure.TYPE:
        raise Failure.from_header(answer).error
    return Dialled.from_header(answer)


async def test_only_the_askers_own_address_is_dialled_whatever_it_asks() -> None:
    async with world() as net:
        (peer,) = await net.internet(1)
        victim = await net.open("5.8.8.8")
        stranger = await net.open("5.9.9.9", listen=[])
        net.dialled.clear()
        question = DialMe((PORT, 22)).to_header() | {"ip": "5.8.8.8", "addresses": [str(victim.addresses[0])]}
        answer = await _ask(stranger.connections, peer, question)
        assert (str(answer.ip), answer.outcomes) == ("5.9.9.9", ("refused", "refused"))
        assert sorted(set(net.dialled) - {("5.9.9.9", f"{PUBLIC[0]}:{PORT}")}) == [
            (PUBLIC[0], f"5.9.9.9:{port}") for port in (22, PORT)
        ]


async def test_another_peer_at_the_askers_address_is_not_taken_for_the_asker() -> None:
    async with world() as net:
        (peer,) = await net.internet(1)
        net.network.forward(ROUTER, PORT, NEIGHBOUR)
        await net.at_home(NEIGHBOUR)
        stranger = await net.at_home(listen=[])
        # Until the neighbour's own dial-back is long enough ago.
        await trio.sleep(PAUSE_S + 10)
        answer = await _ask(stranger.connections, peer, DialMe((PORT,)).to_header())
        assert answer.outcomes == ("wrong_peer",)


async def test_an_address_is_dialled_once_a_minute_for_all_askers_from_there() -> None:
    async with world() as net:
        (peer,) = await net.internet(1)
        one, other = await net.at_home(listen=[]), await net.at_home(NEIGHBOUR, listen=[])
        await _ask(one.connections, peer, DialMe((PORT,)).to_header())
        for asker in (one, other):
            with pytest.raises(Overloaded, match="less than 60 s"):
                await _ask(asker.connections, peer, DialMe((PORT,)).to_header())
        await trio.sleep(PAUSE_S)
        await _ask(other.connections, peer, DialMe((PORT,)).to_header())


async def test_a_storm_of_askers_costs_a_few_dials_at_a_time() -> None:
    async with world() as net:
        (peer,) = await net.internet(1)
        askers = []
        for number in range(30):
            # Behind routers that answer nothing, so that each dial takes its whole time.
            net.network.put_behind_nat(f"5.0.{number}.1", f"5.0.{number}.1")
            askers.append(await net.open(f"5.0.{number}.1", listen=[]))
        net.dialled.clear()
        turned_away = 0

        async def ask(asker: Peer) -> None:
            nonlocal turned_away
            try:
                answer = await _ask(asker.connections, peer, DialMe((PORT,)).to_header())
                assert answer.outcomes == ("silent",)
            except Overloaded:
                turned_away += 1

        async with trio.open_nursery() as nursery:
            for asker in askers:
                nursery.start_soon(ask, asker)
        assert turned_away == 30 - MAX_AT_ONCE
        assert len([one for one in net.dialled if one[0] == PUBLIC[0]]) == MAX_AT_ONCE


async def test_a_public_peer_dials_nobody_in_a_private_range() -> None:
    async with world() as net:
        (peer,) = await net.internet(1)
        # As behind a proxy on the same machine, or with an interface in another LAN.
        for host in ("127.0.0.1", "10.0.0.7", "192.0.2.1"):
            stranger = await net.open(host, listen=[])
            net.dialled.clear()
            with pytest.raises(UnsupportedFeature, match="dial nobody"):
                await _ask(stranger.connections, peer, DialMe((22,)).to_header())
            assert not [one for one in net.dialled if one[0] == PUBLIC[0]]


async def test_a_peer_of_a_lan_dials_its_neighbours_only() -> None:
    async with world() as net:
        peer = await net.open("192.168.1.9")
        neighbour = await net.open("192.168.1.10", listen=[])
        assert (await _ask(neighbour.connections, peer, DialMe((PORT,)).to_header())).outcomes == ("refused",)
        elsewhere = await net.open("10.0.0.10", listen=[])
        with pytest.raises(UnsupportedFeature):
            await _ask(elsewhere.connections, peer, DialMe((PORT,)).to_header())


async def test_a_probe_leaves_the_connection_between_both_as_it_was() -> None:
    async with world() as net:
        (peer,) = await net.internet(1)
        asker = await net.open("5.9.9.9")
        connection = asker.connections.live[peer.peer_id]
        answer = await ask_to_be_dialled(connection, [PORT])
        assert answer.outcomes == ("reached",)
        await trio.sleep(20)
        assert asker.connections.live == {peer.peer_id: connection}
        assert connection.lost is None


@pytest.mark.parametrize(
    "header",
    [
        {"type": "dial_me"},
        {"type": "dial_me", "ports": []},
        {"type": "dial_me", "ports": [0]},
        {"type": "dial_me", "ports": [1, 2, 3, 4, 5]},
        {"type": "dial_me", "ports": [1, 1]},
        {"type": "ping"},
    ],
    ids=str,
)
async def test_a_malformed_question_is_refused_and_dials_nobody(header: dict[str, object]) -> None:
    async with world() as net:
        (peer,) = await net.internet(1)
        stranger = await net.open("5.9.9.9", listen=[])
        net.dialled.clear()
        stream = await stranger.connections.open_stream(peer.peer_id, DIALBACK_PROTOCOL, addresses=peer.addresses)
        async with stream:
            await stream.send(header)
            answer = await stream.receive()
        assert Failure.from_header(answer.header).error.code == "invalid"
        assert not [one for one in net.dialled if one[0] == PUBLIC[0]]


async def test_an_answer_of_another_length_is_the_judges_fault() -> None:
    async with world() as net:
        (peer,) = await net.internet(1)

        async def answer(stream: Stream) -> None:
            async with stream:
                await stream.receive()
                await stream.send({"type": "dialled", "ip": "5.9.9.9", "outcomes": ["reached"] * 2})

        peer.connections.handlers[DIALBACK_PROTOCOL] = answer
        stranger = await net.open("5.9.9.9", listen=[])
        connection = await stranger.connections.connect(peer.peer_id, peer.addresses)
        with pytest.raises(RemoteProtocolError, match="2 ports, not 1"):
            await ask_to_be_dialled(connection, [PORT])


async def test_a_dht_client_answers_no_question_and_leaves_the_tables_for_it() -> None:
    async with world() as net:
        internet = await net.internet(2)
        peer = await net.at_home()
        await until(reach(peer, Reach.PRIVATE), within_s=15)
        # Another peer still believes an old announcement.
        stream = internet[0].connections.live[peer.peer_id].open_stream("/peerd/dht/1")
        async with stream:
            await stream.send({"type": "ping"})
            with pytest.raises(StreamReset):
                await stream.receive()
