"""Circuits in a network in memory: which peers are reached through a relay, by which callers, and how circuits end."""

from dataclasses import replace
from ipaddress import ip_address
from random import Random

import pytest
import trio

from peerd.net.limits.scores import MALFORMED
from peerd.protocol.encoding.schema import parse
from peerd.protocol.errors import ConnectFailed, ConnectionLost, PeerFault, RelayLost, StreamReset, WrongPeer
from peerd.protocol.messages.relay import RELAY_PROTOCOL, RELAY_ROLE, Connect, Reserve, Reserved, inner_message
from peerd.reach.relay import LINGER_S, Relay
from peerd.reach.relay_ledger import RelayLimits
from tests.fakes.relay_fixture import (
    ALL_ANSWERS,
    IDENTITIES,
    KEY,
    LISTEN,
    address,
    ask,
    id_of,
    open_world,
    refusal,
    reserve,
    say,
    until,
    way,
)

# The way through.


async def test_two_peers_that_nobody_can_dial_reach_each_other_through_a_relay():
    async with open_world() as world:
        await world.relay(1)
        server, reservations = await world.behind(10, 1)
        client = await world.start(20)
        assert await ask(client, 10, way(1, 10)) == b"hi"
        # And back, over the same connection.
        assert await ask(server, 20) == b"hi"
        assert client.live[id_of(10)].relay is client.live[id_of(1)]
        assert server.live[id_of(20)].relay is server.live[id_of(1)]
        assert reservations.circuits == 1


async def test_a_circuit_carries_large_messages_whole_in_both_directions():
    async with open_world() as world:
        await world.relay(1)
        await world.behind(10, 1)
        client = await world.start(20)
        body = Random(1).randbytes(3_000_001)
        assert await ask(client, 10, way(1, 10), body=body) == body


async def test_a_large_message_travels_in_frames_that_outer_ones_hold_whole(monkeypatch):
    sizes = []

    def measure(raw):
        sizes.append(len(raw.body))
        return inner_message(raw)

    monkeypatch.setattr("peerd.reach.relay.inner_message", measure)
    async with open_world() as world:
        await world.relay(1)
        await world.behind(10, 1)
        client = await world.start(20)
        await ask(client, 10, way(1, 10), body=bytes(200_000))
        # 16 KiB, less what the outer frame's message needs: 9 bytes, and a margin.
        assert 16_000 < max(sizes) < 16 * 1024 - 9


async def test_peers_that_call_each_other_at_the_same_time_settle_on_one_connection():
    async with open_world() as world:
        for number in (1, 2):
            await world.relay(number)
        one, _ = await world.behind(10, 1)
        other, _ = await world.behind(11, 2)
        answers = []

        async def call(connections, number, relay):
            answers.append(await ask(connections, number, way(relay, number)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, one, 11, 2)
            nursery.start_soon(call, other, 10, 1)
        await trio.sleep(LINGER_S + 1)
        assert answers == [b"hi"] * 2
        assert sum(relay.ledger.circuits for relay in world.relays.values()) == 1
        assert one.live[id_of(11)].relay.peer_id == other.live[id_of(10)].relay.peer_id


async def test_nobody_can_tell_where_a_peer_behind_a_circuit_is():
    async with open_world() as world:
        await world.relay(1)
        server, _ = await world.behind(10, 1)
        client = await world.start(20)
        connection = await client.connect(id_of(10), [way(1, 10)])
        assert (await connection.wait_hello()).observed_ip == ""
        assert server.live[id_of(20)].remote_ip is None
        # What it does counts as its relay's doing.
        assert str(server.live[id_of(20)].accountable_ip) == "8.8.1.8"


async def test_a_direct_address_is_preferred_in_whichever_order_they_are_given():
    async with open_world() as world:
        await world.relay(1)
        await world.behind(10, 1, listen=[LISTEN])
        client = await world.start(20)
        connection = await client.connect(id_of(10), [way(1, 10), address(10)])
        assert connection.relay is None


async def test_the_relay_takes_over_where_the_direct_address_does_not_answer():
    async with open_world() as world:
        await world.relay(1)
        await world.behind(10, 1)
        world.network.partition("8.8.20.8", "8.8.10.8")
        client = await world.start(20)
        started = trio.current_time()
        connection = await client.connect(id_of(10), [address(10), way(1, 10)])
        assert connection.relay is not None
        assert trio.current_time() - started < 1


async def test_a_private_swarm_works_through_its_relay():
    async with open_world() as world:
        await world.relay(1, swarm_key=KEY)
        await world.behind(10, 1, swarm_key=KEY)
        client = await world.start(20, swarm_key=KEY)
        assert await ask(client, 10, way(1, 10)) == b"hi"


async def test_a_private_swarm_s_key_is_proven_inside_the_circuit():
    async with open_world() as world:
        # A relay without the swarm's key does not help a caller without it.
        await world.relay(1)
        server, _ = await world.behind(10, 1)
        client, stranger = await world.start(20), await world.start(21)
        for one in (client, stranger):
            await one.connect(id_of(1), [address(1)])
        # What is dialled and taken from now on is the private swarm's.
        for one in (server, client):
            one._runs._maker = replace(one._runs._maker, swarm_key=KEY)
        with pytest.raises(ConnectFailed):
            await stranger.connect(id_of(10), [way(1, 10)])
        assert await ask(client, 10, way(1, 10)) == b"hi"


# The PeerIds at the two ends.


async def test_a_relay_that_answers_in_the_peer_s_place_is_found_out():
    async with open_world() as world:
        relay = await world.relay(1)
        impostor, _ = await world.behind(11, 1)
        reservations = world.relays[1]._reservations
        reservations[id_of(10)] = reservations[id_of(11)]
        client = await world.start(20)
        with pytest.raises(WrongPeer):
            await client.connect(id_of(10), [way(1, 10)])
        assert not {id_of(10), id_of(11)} & set(client.live)
        assert relay.live.keys() == {id_of(11), id_of(20)}
        assert impostor.live.keys() == {id_of(1)}


@pytest.mark.parametrize("message", [0, 1, 2, 5, 9])
async def test_a_relay_that_changes_one_bit_ends_the_connection(message, monkeypatch):
    passed = 0

    def tamper(raw):
        nonlocal passed
        body = bytearray(inner_message(raw))
        if passed == message:
            body[len(body) // 2] ^= 1
        passed += 1
        return memoryview(body)

    monkeypatch.setattr("peerd.reach.relay.inner_message", tamper)
    async with open_world() as world:
        await world.relay(1)
        await world.behind(10, 1)
        client = await world.start(20)
        with pytest.raises(PeerFault):
            await ask(client, 10, way(1, 10))
        await until(lambda: passed > message)


async def test_a_relay_sees_neither_what_is_said_nor_the_handshake_s_identities(monkeypatch):
    seen = bytearray()

    def look(raw):
        seen.extend(inner_message(raw))
        return inner_message(raw)

    monkeypatch.setattr("peerd.reach.relay.inner_message", look)
    async with open_world() as world:
        await world.relay(1)
        await world.behind(10, 1)
        client = await world.start(20)
        assert await ask(client, 10, way(1, 10), body=b"what nobody else may read") == b"what nobody else may read"
        assert len(seen) > 500
        for secret in (b"what nobody", b"/echo/1", IDENTITIES[10].public_key, IDENTITIES[20].public_key):
            assert secret not in seen


# One hop.


async def test_nobody_reserves_or_calls_through_a_circuit():
    async with open_world() as world:
        await world.relay(1)
        # A relay that itself can be reached through another only.
        second, _ = await world.behind(2, 1, roles=[RELAY_ROLE])
        second.handlers[RELAY_PROTOCOL] = Relay(id_of(2), RelayLimits()).answer
        client = await world.start(20)
        await client.connect(id_of(2), [way(1, 2)])
        for message in (Reserve(), Connect(id_of(10))):
            stream = await client.open_stream(id_of(2), RELAY_PROTOCOL)
            assert (await say(stream, message)).code == "invalid"
        with pytest.raises(ConnectFailed, match="circuits through two relays are not possible"):
            await client.connect(id_of(10), [way(2, 10)])


async def test_a_peer_does_not_reserve_at_a_relay_that_it_reaches_through_another():
    async with open_world() as world:
        await world.relay(1)
        second, _ = await world.behind(2, 1, roles=[RELAY_ROLE])
        second.handlers[RELAY_PROTOCOL] = Relay(id_of(2), RelayLimits()).answer
        peer, reservations = await world.behind(10, 1)
        await peer.connect(id_of(2), [way(1, 2)])
        await trio.sleep(300)
        assert reservations.held.keys() == {id_of(1)}


@pytest.mark.parametrize("target", [20, 1])
async def test_a_circuit_to_oneself_or_to_the_relay_is_refused(target):
    async with open_world() as world:
        await world.relay(1)
        client = await world.start(20)
        await reserve(client, 1)
        assert (await refusal(client, 1, Connect(id_of(target)))).code == "invalid"


async def test_an_address_whose_relay_is_one_of_its_ends_is_not_dialled():
    async with open_world() as world:
        await world.relay(1)
        client = await world.start(20)
        with pytest.raises(ConnectFailed, match="one of the two ends"):
            await client.connect(id_of(1), [way(1, 1)])
        with pytest.raises(ConnectFailed, match="one of the two ends"):
            await client.connect(id_of(1), [way(20, 1)])
        with pytest.raises(ConnectFailed, match="does not name the peer behind the relay"):
            await client.connect(None, [way(1, 10).with_peer(None)])


async def test_the_relay_itself_uses_the_connection_that_a_peer_keeps_to_it():
    async with open_world() as world:
        relay = await world.relay(1)
        await world.behind(10, 1)
        # A server's next hop may name the server itself as its relay.
        assert await ask(relay, 10, way(1, 10)) == b"hi"
        assert relay.live[id_of(10)].relay is None


async def test_a_peer_that_refuses_to_be_relayed_dials_no_relay():
    async with open_world() as world:
        await world.relay(1)
        await world.behind(10, 1)
        client = await world.start(20, may_be_relayed=False)
        with pytest.raises(ConnectFailed, match="we use no relays"):
            await client.connect(id_of(10), [way(1, 10)])
        assert not client.live


# What a relay refuses.


async def test_a_peer_without_a_reservation_cannot_be_called():
    async with open_world() as world:
        await world.relay(1)
        client, other = await world.start(20), await world.start(21)
        # Being connected is no leave to be called.
        await other.connect(id_of(1), [address(1)])
        said = await refusal(client, 1, Connect(id_of(21)))
        assert (said.code, "has no reservation" in said.message) == ("connect", True)


async def test_a_relay_gives_as_many_slots_as_its_operator_set_and_takes_them_back():
    async with open_world() as world:
        await world.relay(1, slots=8)
        peers = [await world.start(number) for number in range(10, 13)]
        first, _ = [await reserve(peer, 1) for peer in peers[:2]]
        # All three come from addresses of their own.
        world.relays[1].ledger.limits = RelayLimits(slots=2)
        said = await refusal(peers[2], 1, Reserve())
        assert (said.code, "no slot free" in said.message) == ("overloaded", True)
        first.close()
        await until(lambda: world.relays[1].ledger.slots == 1)
        await reserve(peers[2], 1)
        # A connection that breaks gives its slot back too.
        world.network.kill("8.8.12.8")
        await until(lambda: world.relays[1].ledger.slots == 1)


async def test_a_peer_that_reserves_again_has_one_slot_and_the_newer_way():
    async with open_world() as world:
        await world.relay(1, slots=4)
        peer = await world.start(10)
        first = await reserve(peer, 1)
        second = await reserve(peer, 1)
        with pytest.raises(StreamReset) as caught:
            await first.receive()
        assert caught.value.reason == "replaced"
        assert world.relays[1].ledger.slots == 1
        assert isinstance(await say(second, Reserve()), Reserved)
        assert world.relays[1].ledger.slots == 1


async def test_a_reservation_that_is_not_renewed_expires():
    async with open_world() as world:
        await world.relay(1, expiry_s=600)
        peer = await world.start(10)
        stream = await reserve(peer, 1)
        await trio.sleep(590)
        assert isinstance(await say(stream, Reserve()), Reserved)
        await trio.sleep(590)
        assert world.relays[1].ledger.slots == 1
        with pytest.raises(StreamReset) as caught:
            await stream.receive()
        assert caught.value.reason == "expired"
        assert world.relays[1].ledger.slots == 0


async def test_a_relay_that_leaves_refuses_and_ends_nothing():
    async with open_world() as world:
        await world.relay(1)
        await world.behind(10, 1)
        client, late = await world.start(20), await world.start(21)
        await client.connect(id_of(10), [way(1, 10)])
        world.relays[1].draining = True
        assert (await refusal(late, 1, Connect(id_of(10)))).code == "draining"
        assert (await refusal(late, 1, Reserve())).code == "draining"
        assert await ask(client, 10) == b"hi"


async def test_a_relay_that_is_silent_at_first_is_not_waited_for():
    async with open_world() as world:
        await world.relay(1)
        await world.behind(10, 1)
        client = await world.start(20)
        stream = await client.open_stream(id_of(1), RELAY_PROTOCOL, addresses=[address(1)])
        await stream.send({"type": "reserve", "x": 1})
        assert isinstance(parse((await stream.receive()).header, ALL_ANSWERS), Reserved)
        silent = await client.open_stream(id_of(1), RELAY_PROTOCOL)
        with pytest.raises(StreamReset) as caught:
            await silent.receive()
        assert caught.value.reason == "unresponsive"


@pytest.mark.parametrize("header", [{"type": "connect"}, {"type": "connect", "peer": "me"}, {"type": "accepted"}, {}])
async def test_what_is_no_request_ends_its_stream_and_nothing_else(header):
    async with open_world() as world:
        await world.relay(1)
        client = await world.start(20)
        stream = await client.open_stream(id_of(1), RELAY_PROTOCOL, addresses=[address(1)])
        await stream.send(header)
        with pytest.raises(StreamReset) as caught:
            await stream.receive()
        assert caught.value.reason == "protocol"
        assert await reserve(client, 1)


# How a circuit ends.


async def test_a_relay_that_dies_ends_its_connections_at_once():
    async with open_world() as world:
        await world.relay(1)
        server, reservations = await world.behind(10, 1)
        client = await world.start(20)
        connection = await client.connect(id_of(10), [way(1, 10)])
        started = trio.current_time()
        world.network.kill("8.8.1.8")
        # The peer is not to blame, and a caller that comes too late gets the same reason.
        assert isinstance(await connection.wait_lost(), RelayLost)
        with pytest.raises(RelayLost):
            connection.open_stream("/echo/1")
        # The task that holds the reservation takes the address back a moment after its connection is gone.
        await until(lambda: not server.live and world.announced[10] == ())
        assert trio.current_time() - started < 1
        await until(lambda: reservations.circuits == 0)
        assert trio.current_time() - started < 1.5


async def test_a_relay_that_hangs_is_noticed_as_soon_as_any_peer_that_does():
    async with open_world() as world:
        await world.relay(1)
        await world.behind(10, 1)
        client = await world.start(20)
        connection = await client.connect(id_of(10), [way(1, 10)])
        started = trio.current_time()
        for number in (10, 20):
            world.network.partition("8.8.1.8", f"8.8.{number}.8")
        assert isinstance(await connection.wait_lost(), ConnectionLost)
        assert trio.current_time() - started < 11


async def test_when_one_end_dies_the_other_hears_of_it_at_once():
    async with open_world() as world:
        relay = await world.relay(1)
        await world.behind(10, 1)
        client = await world.start(20)
        connection = await client.connect(id_of(10), [way(1, 10)])
        started = trio.current_time()
        world.network.kill("8.8.10.8")
        assert isinstance(await connection.wait_lost(), ConnectionLost)
        assert trio.current_time() - started < 1
        await until(lambda: world.relays[1].ledger.circuits == 0)
        assert relay.live.keys() == {id_of(20)}


async def test_an_end_that_says_goodbye_is_heard_and_the_circuit_is_given_back():
    async with open_world() as world:
        await world.relay(1)
        server, reservations = await world.behind(10, 1)
        client = await world.start(20)
        connection = await client.connect(id_of(10), [way(1, 10)])
        await connection.wait_hello()
        there = server.live[id_of(20)]
        connection.close("draining", "the client leaves")
        lost = await there.wait_lost()
        assert "the client leaves" in str(lost)
        assert not isinstance(lost, RelayLost)
        await trio.sleep(LINGER_S + 1)
        assert (world.relays[1].ledger.circuits, reservations.circuits) == (0, 0)
        # The reservation stands: the next one comes through.
        assert await ask(client, 10, way(1, 10)) == b"hi"


async def test_a_circuit_lives_no_longer_than_the_operator_said():
    async with open_world() as world:
        await world.relay(1, circuit_s=100)
        await world.behind(10, 1)
        client = await world.start(20)
        connection = await client.connect(id_of(10), [way(1, 10)])
        started = trio.current_time()
        assert "expired" in str(await connection.wait_lost())
        assert trio.current_time() - started == pytest.approx(100, abs=1)
        assert world.relays[1].ledger.circuits == 0
        assert await ask(client, 10, way(1, 10)) == b"hi"


async def test_a_relay_is_not_blamed_for_what_it_carries():
    """It cannot read that. If it were, a stranger could make a peer refuse its own relays."""
    async with open_world() as world:
        relay = await world.relay(1)
        server, _ = await world.behind(10, 1)
        stranger, honest = await world.start(20), await world.start(21)
        assert await ask(stranger, 10, way(1, 10)) == b"hi"
        for _ in range(12):
            server.live[id_of(20)]._score("malformed messages", MALFORMED)
        scores = server.containment.scores
        assert {score.name for score in scores.listed(trio.current_time())} == {str(id_of(20))}
        assert not server.containment.refuses(relay.peer_id, ip_address("8.8.1.8"))
        assert await ask(honest, 10, way(1, 10)) == b"hi"
