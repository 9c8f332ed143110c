"""Addresses that change: what was found out is found out again."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from ipaddress import ip_address
from random import Random

import pytest
import trio
import trio.lowlevel

from peerd.net.connections import Stream
from peerd.peer import Peer
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.messages.dialback import DIALBACK_PROTOCOL
from peerd.reach.checker import SETTLE_S, ReachChecker
from peerd.reach.dialback import PAUSE_S
from peerd.reach.relay_ledger import RelayLimits
from peerd.routing.reach.verdict import Reach
from peerd.trio_tools import open_tasks
from tests.fakes.reach_fixture import EPOCH, HOME, PORT, PUBLIC, ROUTER, hosts, reach, server_record, until, world


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
        peer.discovery.announce_from(lambda: [server_record()])
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
        peer.discovery.announce_from(lambda: [server_record()])
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
        peer.discovery.announce_from(lambda: [server_record()])
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
