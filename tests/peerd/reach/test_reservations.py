"""How reservations are found, renewed and replaced, and what is announced of them."""

from itertools import pairwise
from random import Random
from types import SimpleNamespace

import pytest
import trio

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.messages.relay import RELAY_PROTOCOL, RELAY_ROLE
from peerd.reach.relay import Relay
from peerd.reach.relay_addresses import ADDRESSES_A_RELAY, addresses_of
from peerd.reach.relay_ledger import RelayLimits
from peerd.reach.reservations import MAX_ASKED, WANTED_RELAYS, Reservations
from peerd.routing.dht.table import Contact
from tests.fakes.relay_fixture import LATENCY_S, LISTEN, address, ask, id_of, open_world, until


def contact(number):
    return Contact(id_of(number), (address(number),))


async def start_keeping(world, number, contacts, *, wanted=True):
    """A peer that keeps reservations, and the list of what it announced, in order."""
    connections = await world.start(number)
    announced = []
    reservations = Reservations(connections, lambda: contacts, announced.append, Random(number))
    reservations.wanted = wanted
    nursery = await world.stack.enter_async_context(trio.open_nursery())
    nursery.start_soon(reservations.run)
    world.stack.callback(nursery.cancel_scope.cancel)
    return connections, reservations, announced


async def test_two_of_several_relays_are_held_and_announced():
    async with open_world() as world:
        for number in (1, 2, 3):
            await world.relay(number)
        _, reservations, announced = await start_keeping(world, 10, [contact(number) for number in (1, 2, 3)])
        await until(lambda: len(reservations.held) == WANTED_RELAYS)
        await trio.sleep(200)
        assert len(reservations.held) == WANTED_RELAYS
        assert sum(relay.ledger.slots for relay in world.relays.values()) == WANTED_RELAYS
        assert announced[-1] == reservations.relay_addresses
        assert {one.peer_id for one in announced[-1]} == set(reservations.held)
        # Nothing has changed since, so the observer was not called again.
        assert len(announced) == WANTED_RELAYS


async def test_nothing_is_reserved_until_it_is_wanted_and_all_is_given_back_when_it_is_not():
    async with open_world() as world:
        await world.relay(1)
        connections, reservations, announced = await start_keeping(world, 10, [contact(1)], wanted=False)
        await trio.sleep(600)
        assert not connections.live
        for _ in range(2):
            reservations.wanted = True
            await until(lambda: reservations.held)
            assert announced[-1] == (address(1),)
            reservations.wanted = False
            await until(lambda: not world.relays[1].ledger.slots)
            assert not reservations.held
            assert announced[-1] == ()


async def test_a_reservation_is_renewed_before_it_expires():
    async with open_world() as world:
        await world.relay(1, expiry_s=20)
        _, reservations, announced = await start_keeping(world, 10, [contact(1)])
        await until(lambda: reservations.held)
        await trio.sleep(300)
        assert reservations.held
        assert announced == [(address(1),)]


async def test_a_relay_that_is_lost_is_replaced_by_another():
    async with open_world() as world:
        for number in (1, 2, 3):
            await world.relay(number)
        _, reservations, announced = await start_keeping(world, 10, [contact(number) for number in (1, 2, 3)])
        await until(lambda: len(reservations.held) == WANTED_RELAYS)
        lost = next(number for number in (1, 2, 3) if id_of(number) in reservations.held)
        world.network.kill(f"8.8.{lost}.8")
        await until(lambda: id_of(lost) not in {one.peer_id for one in announced[-1]})
        started = trio.current_time()
        await until(lambda: len(reservations.held) == WANTED_RELAYS)
        assert trio.current_time() - started < 3
        assert id_of(lost) not in reservations.held


async def test_a_relay_that_comes_back_is_used_again():
    async with open_world() as world:
        relay = await world.relay(1)
        _, reservations, _ = await start_keeping(world, 10, [contact(1)])
        await until(lambda: reservations.held)
        world.network.disconnect("8.8.1.8", "8.8.10.8")
        await until(lambda: not reservations.held)
        started = trio.current_time()
        await until(lambda: reservations.held)
        # A relay that ended the reservation is left alone for a moment, as any peer that failed.
        assert trio.current_time() - started < 15
        assert relay.live.keys() == {id_of(10)}


async def test_a_relay_without_a_free_slot_is_asked_ever_more_seldom():
    async with open_world() as world:
        relay = await world.relay(1)
        asked_at = []

        async def full(stream):
            await stream.receive()
            asked_at.append(trio.current_time())
            await stream.send({"type": "error", "code": "overloaded", "message": "no slot free"})

        relay.handlers[RELAY_PROTOCOL] = full
        _, reservations, announced = await start_keeping(world, 10, [contact(1)])
        await trio.sleep(1000)
        gaps_s = [after - before for before, after in pairwise(asked_at)]
        assert 5 < len(asked_at) < 15
        assert gaps_s[-1] > 300
        assert not announced
        # Once the relay has room, the peer gets its reservation without any action.
        relay.handlers[RELAY_PROTOCOL] = world.relays[1].answer
        await trio.sleep(700)
        assert reservations.held


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {"type": "reserved"},
        {"type": "reserved", "expires_s": 0, "circuits": 1, "bytes_a_second": 1, "circuit_s": 1},
        {"type": "connected", "bytes_a_second": 1, "circuit_s": 1},
        {"type": "error", "code": "no such code"},
    ],
    ids=str,
)
async def test_a_relay_that_answers_nonsense_or_nothing_is_given_up_for_another(answer):
    async with open_world() as world:
        bad = await world.relay(1)

        async def nonsense(stream):
            await stream.receive()
            if answer is None:
                await trio.sleep_forever()
            await stream.send(answer)

        bad.handlers[RELAY_PROTOCOL] = nonsense
        await world.relay(2)
        _, reservations, announced = await start_keeping(world, 10, [contact(1), contact(2)])
        await trio.sleep(60)
        assert reservations.held.keys() == {id_of(2)}
        assert announced == [(address(2),)]


async def test_a_relay_that_is_no_peer_s_contact_but_connected_is_asked():
    async with open_world() as world:
        await world.relay(1)
        connections, reservations, _ = await start_keeping(world, 10, [])
        await connections.connect(id_of(1), [address(1)])
        await until(lambda: reservations.held)


async def test_only_relays_are_asked_and_a_search_meets_few_strangers():
    async with open_world() as world:
        crowd = [await world.start(number, listen=[LISTEN]) for number in range(20, 50)]
        met = []
        for one in crowd:
            one.on_connected.append(met.append)
        _, reservations, _ = await start_keeping(world, 10, [contact(number) for number in range(20, 50)])
        await trio.sleep(1)
        assert 0 < len(met) <= WANTED_RELAYS * MAX_ASKED
        crowd[0].present_as(roles=[RELAY_ROLE])
        relay = Relay(id_of(20), RelayLimits())
        crowd[0].handlers[RELAY_PROTOCOL] = relay.answer
        await until(lambda: reservations.held)
        assert relay.ledger.slots == 1


async def test_no_connection_is_kept_to_strangers_that_turned_out_to_be_no_relays():
    async with open_world() as world:
        crowd = [await world.start(number, listen=[LISTEN]) for number in range(20, 30)]
        met = []
        for one in crowd:
            one.on_connected.append(met.append)
        connections, _, _ = await start_keeping(world, 10, [contact(number) for number in range(20, 30)])
        await trio.sleep(900)
        assert not connections.live
        # Each was asked now and then, not in every search.
        assert len(crowd) < len(met) < 10 * len(crowd)


async def test_the_nearer_of_two_relays_is_asked_first():
    async with open_world() as world:
        for number in (1, 2, 3, 4):
            await world.relay(number)
            world.network.set_latency(f"8.8.{number}.8", "8.8.10.8", LATENCY_S if number > 2 else 0.3)
        connections, reservations, _ = await start_keeping(world, 10, [], wanted=False)
        for number in (1, 2, 3, 4):
            await (await connections.connect(id_of(number), [address(number)])).wait_hello()
        await trio.sleep(2)
        reservations.wanted = True
        await until(lambda: len(reservations.held) == WANTED_RELAYS)
        assert reservations.held.keys() == {id_of(3), id_of(4)}


async def test_clients_go_on_through_the_other_relay():
    async with open_world() as world:
        for number in (1, 2):
            await world.relay(number)
        await world.behind(10, 1, 2)
        client = await world.start(20)
        connection = await client.connect(id_of(10), world.ways(10))
        dead = next(number for number in (1, 2) if id_of(number) == connection.relay.peer_id)
        world.network.kill(f"8.8.{dead}.8")
        await connection.wait_lost()
        started = trio.current_time()
        assert await ask(client, 10, *world.ways(10)) == b"hi"
        assert trio.current_time() - started < 1


# What is announced of a relay.


def where(text):
    return Multiaddr.parse(text)


@pytest.mark.parametrize(
    ("seen_at", "claimed", "expected"),
    [
        # Its public addresses, first the one that works for us.
        ("8.8.4.4", ["/ip4/9.9.9.9/tcp/1/ws", "/ip4/8.8.4.4/tcp/1/ws"], ["8.8.4.4", "9.9.9.9"]),
        # A private address is useless if there is a public one.
        ("8.8.4.4", ["/ip4/192.168.1.1/tcp/1/ws", "/ip4/8.8.4.4/tcp/1/ws"], ["8.8.4.4"]),
        ("192.168.1.1", ["/ip4/192.168.1.1/tcp/1/ws", "/dns4/relay.example.org/tcp/443/wss"], ["relay.example.org"]),
        # In a LAN, the LAN's; on one machine, its own.
        ("192.168.1.1", ["/ip4/127.0.0.1/tcp/1/ws", "/ip4/192.168.1.1/tcp/1/ws"], ["192.168.1.1"]),
        ("127.0.0.1", ["/ip4/127.0.0.1/tcp/1/ws"], ["127.0.0.1"]),
        # What cannot be dialled, or leads through a third peer, is no way to it.
        ("8.8.4.4", ["/ip4/0.0.0.0/tcp/1/ws", "/ip4/8.8.4.4/tcp/0/ws"], []),
        ("8.8.4.4", [f"/ip4/9.9.9.9/tcp/1/ws/p2p/{id_of(2)}/p2p-circuit"], []),
        ("8.8.4.4", [f"/dns/{'a' * 60}.{'b' * 60}.{'c' * 60}.org/tcp/1/ws"], []),
        ("8.8.4.4", [f"/ip4/9.9.9.{n}/tcp/1/ws" for n in range(9)], ["9.9.9.0", "9.9.9.1"]),
    ],
)
def test_a_relay_is_announced_as_widely_as_it_can_be_found(seen_at, claimed, expected):
    relay = SimpleNamespace(remote_ip=where(f"/ip4/{seen_at}/tcp/1/ws").ip, peer_id=id_of(1))
    found = addresses_of(relay, map(where, claimed), [])
    assert [one.host for one in found] == expected
    assert all(one.peer_id == id_of(1) and one.relay is None for one in found)
    assert len(found) <= ADDRESSES_A_RELAY


async def test_a_relay_that_says_nothing_of_where_it_is_is_announced_where_it_was_found():
    async with open_world() as world:
        relay = await world.relay(1)
        relay.present_as(listen_as=())
        _, reservations, announced = await start_keeping(world, 10, [contact(1)])
        await until(lambda: reservations.held)
        assert announced == [(address(1),)]
