"""A relay's limits, and their effect on greedy, slow and hostile peers."""

from random import Random

import pytest
import trio

from peerd.net.dialling.circuits import CIRCUIT_PRIORITY
from peerd.net.limits.gate import MAX_UNPROVEN_AN_ADDRESS
from peerd.net.limits.rates import TokenBucket
from peerd.protocol.encoding.schema import parse
from peerd.protocol.errors import ConnectFailed, Overloaded, StreamReset
from peerd.protocol.messages.relay import (
    CIRCUIT_PROTOCOL,
    MAX_INNER_BYTES,
    RELAY_PROTOCOL,
    Accepted,
    Connect,
    Connected,
)
from peerd.protocol.messages.session import Failure
from peerd.reach.relay import MIN_CHARGED_BYTES
from peerd.reach.relay_ledger import CALLS_A_SECOND, CALLS_BURST, RelayLedger, RelayLimits
from tests.fakes.relay_fixture import ALL_ANSWERS, address, ask, id_of, open_world, reserve, say, until, way

MIB = 2**20


async def call(connections, relay, peer):
    """A circuit by hand: its stream, on which nothing was said inside yet."""
    stream = await connections.open_stream(
        id_of(relay), RELAY_PROTOCOL, addresses=[address(relay)], priority=CIRCUIT_PRIORITY
    )
    said = await say(stream, Connect(id_of(peer)))
    return stream if isinstance(said, Connected) else said


async def by_hand(world, number, relay, handler):
    """A reserved peer that does with circuits what a test wants."""

    async def answer(stream):
        await stream.receive(max_body=0)
        await stream.send(Accepted().to_header())
        await handler(stream)

    connections = await world.start(number, handlers={CIRCUIT_PROTOCOL: answer})
    await reserve(connections, relay)
    return connections


async def never_read(_stream):
    await trio.sleep_forever()


async def read_all(stream):
    while True:
        await stream.receive(MAX_INNER_BYTES)


# Rates.


def test_a_bucket_lets_a_burst_pass_and_then_its_rate():
    bucket = TokenBucket(10, 5, now=0)
    waits = [bucket.take(1, now=0) for _ in range(8)]
    assert waits == pytest.approx([0, 0, 0, 0, 0, 0.1, 0.2, 0.3])
    assert bucket.take(1, now=10) == 0


def test_a_bucket_that_is_asked_in_vain_is_no_emptier():
    bucket = TokenBucket(1, 2, now=0)
    assert [bucket.try_take(1, now=0) for _ in range(5)] == [True, True, False, False, False]
    assert [bucket.try_take(1, now=1) for _ in range(2)] == [True, False]


async def test_a_circuit_passes_no_more_than_its_rate_and_drops_nothing():
    async with open_world() as world:
        await world.relay(1, bytes_a_second=MIB // 2)
        await world.behind(10, 1)
        client = await world.start(20)
        body = Random(1).randbytes(2 * MIB)
        await client.connect(id_of(10), [way(1, 10)])
        started = trio.current_time()
        assert await ask(client, 10, body=body) == body
        # 4 s there, then 4 s back, but for the bursts.
        assert 7 < trio.current_time() - started < 8.5


async def test_all_circuits_together_pass_no_more_than_the_relay_s_rate():
    async with open_world() as world:
        await world.relay(1, bytes_a_second=4 * MIB, total_bytes_a_second=MIB)
        await world.behind(10, 1)
        clients = [await world.start(number) for number in range(20, 24)]
        for client in clients:
            await client.connect(id_of(10), [way(1, 10)])
        body = Random(1).randbytes(MIB // 2)
        took_s = []

        async def run(client):
            started = trio.current_time()
            assert await ask(client, 10, body=body) == body
            took_s.append(trio.current_time() - started)

        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(run, client)
        # Four times half a MiB, in both directions; and none takes much longer than the others.
        assert 3.5 < max(took_s) < 5
        assert min(took_s) > 0.7 * max(took_s)


async def test_small_messages_cost_as_much_as_the_work_they_make():
    async with open_world() as world:
        await world.relay(1, bytes_a_second=100 * MIN_CHARGED_BYTES)
        received = 0

        async def count(stream):
            nonlocal received
            while True:
                await stream.receive(MAX_INNER_BYTES)
                received += 1

        await by_hand(world, 10, 1, count)
        client = await world.start(20)
        stream = await call(client, 1, 10)
        with trio.move_on_after(10):
            while True:
                await stream.send({}, [b"x"])
        assert 900 < received < 1100


# Slow and greedy ends.


async def test_an_end_that_does_not_read_stalls_its_own_circuit_and_is_held_little():
    async with open_world() as world:
        relay = await world.relay(1)
        await by_hand(world, 10, 1, never_read)
        await world.behind(11, 1)
        client = await world.start(20)
        stalled = await call(client, 1, 10)
        sent = 0
        with trio.move_on_after(60):
            while True:
                await stalled.send({}, [bytes(16 * 1024)])
                await stalled.wait_unsent_below(1)
                sent += 16 * 1024
        # Two windows of 64 KiB, and what the relay has in hand.
        assert sent <= (2 * 64 + 3 * 16) * 1024
        assert len(relay.live) == 3
        # The same caller's other circuit, and others', are none the worse.
        assert await ask(client, 11, way(1, 11), body=bytes(MIB)) == bytes(MIB)


async def test_what_is_urgent_inside_a_circuit_waits_for_little_that_is_not():
    async with open_world() as world:
        await world.relay(1, bytes_a_second=MIB)
        await world.behind(10, 1)
        client = await world.start(20)
        await client.connect(id_of(10), [way(1, 10)])
        bulk = await client.open_stream(id_of(10), "/sink/1", priority=3)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bulk.send, {}, [bytes(32 * MIB)])
            await trio.sleep(5)
            waits_s = []
            for _ in range(10):
                started = trio.current_time()
                await ask(client, 10)
                waits_s.append(trio.current_time() - started)
            assert bulk.unsent_messages == 1
            nursery.cancel_scope.cancel()
            bulk.reset("cancelled")
        # At 1 MiB/s a queue of 32 MiB takes half a minute; a window and what the relay holds, an eighth of a second.
        assert max(waits_s) < 0.2


async def test_a_flood_in_one_circuit_takes_its_own_rate_only():
    async with open_world() as world:
        await world.relay(1, bytes_a_second=MIB, total_bytes_a_second=8 * MIB)
        await by_hand(world, 10, 1, read_all)
        await world.behind(11, 1)
        flooder, client = await world.start(20), await world.start(21)
        await client.connect(id_of(11), [way(1, 11)])

        async def flood():
            stream = await call(flooder, 1, 10)
            while True:
                await stream.send({}, [bytes(MAX_INNER_BYTES)])

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(flood)
            await trio.sleep(2)
            started = trio.current_time()
            assert await ask(client, 11, body=bytes(MIB)) == bytes(MIB)
            assert trio.current_time() - started < 2.5
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("header", "size"), [({}, 0), ({}, MAX_INNER_BYTES + 1), ({"type": "connect"}, 10), ({"a": 1}, 10)]
)
async def test_what_no_circuit_carries_ends_it_on_both_sides(header, size):
    ended = []

    async def watch(stream):
        try:
            await stream.receive(MAX_INNER_BYTES)
        except StreamReset as error:
            ended.append(error.reason)

    async with open_world() as world:
        await world.relay(1)
        await by_hand(world, 10, 1, watch)
        client = await world.start(20)
        stream = await call(client, 1, 10)
        await stream.send(header, [bytes(size)])
        with pytest.raises(StreamReset) as caught:
            await stream.receive()
        assert caught.value.reason == "protocol"
        await until(lambda: ended == ["protocol"])
        assert world.relays[1].ledger.circuits == 0


# How many.


async def test_one_caller_has_as_many_circuits_as_the_operator_set():
    async with open_world() as world:
        await world.relay(1, circuits_a_caller=3)
        await by_hand(world, 10, 1, read_all)
        client, other = await world.start(20), await world.start(21)
        streams = [await call(client, 1, 10) for _ in range(3)]
        refused = await call(client, 1, 10)
        assert (refused.code, "one caller" in refused.message) == ("overloaded", True)
        assert not isinstance(await call(other, 1, 10), Failure)
        streams[0].reset("closed")
        await trio.sleep(1)
        assert not isinstance(await call(client, 1, 10), Failure)


async def test_one_reserved_peer_has_as_many_circuits_as_the_operator_set():
    async with open_world() as world:
        await world.relay(1, circuits_a_peer=2)
        await by_hand(world, 10, 1, read_all)
        clients = [await world.start(number) for number in range(20, 23)]
        said = [await call(client, 1, 10) for client in clients]
        assert [isinstance(one, Failure) for one in said] == [False, False, True]
        assert said[2].code == "overloaded"


async def test_the_relay_as_a_whole_has_as_many_circuits_as_the_operator_set():
    async with open_world() as world:
        await world.relay(1, circuits=2)
        peers = [await by_hand(world, number, 1, read_all) for number in (10, 11, 12)]
        assert len(peers) == 3
        client = await world.start(20)
        said = [await call(client, 1, number) for number in (10, 11, 12)]
        assert [isinstance(one, Failure) for one in said] == [False, False, True]


async def test_a_storm_of_calls_is_refused_before_it_reaches_the_peer():
    called = 0

    async def count(_stream):
        nonlocal called
        called += 1

    async with open_world() as world:
        await world.relay(1)
        await by_hand(world, 10, 1, count)
        client, honest = await world.start(20), await world.start(21)
        codes = []
        for _ in range(300):
            said = await call(client, 1, 10)
            if isinstance(said, Failure):
                codes.append(said.code)
            else:
                said.reset("closed")
        elapsed_s = trio.current_time()
        assert set(codes) == {"overloaded"}
        assert called <= CALLS_BURST + CALLS_A_SECOND * elapsed_s + 1
        assert not isinstance(await call(honest, 1, 10), Failure)
        assert world.relays[1].ledger.circuits <= 2


async def test_circuits_whose_handshake_never_comes_take_no_more_room_than_websockets_do():
    async with open_world() as world:
        await world.relay(1)
        server, reservations = await world.behind(10, 1)
        callers = [await world.start(number) for number in range(20, 20 + MAX_UNPROVEN_AN_ADDRESS + 1)]
        said = [await call(caller, 1, 10) for caller in callers]
        assert [isinstance(one, Failure) for one in said] == [False] * MAX_UNPROVEN_AN_ADDRESS + [True]
        assert said[-1].code == "overloaded"
        # Ten seconds are what a handshake may take, and two what may still be said after the other end has finished.
        await trio.sleep(13)
        assert reservations.circuits == 0
        assert world.relays[1].ledger.circuits == 0
        client = await world.start(40)
        assert await ask(client, 10, way(1, 10)) == b"hi"
        assert server.live.keys() == {id_of(1), id_of(40)}


async def test_a_reserved_peer_that_does_not_take_calls_costs_the_caller_five_seconds():
    async with open_world() as world:
        await world.relay(1)

        async def never(_stream):
            await trio.sleep_forever()

        connections = await world.start(10, handlers={CIRCUIT_PROTOCOL: never})
        await reserve(connections, 1)
        client = await world.start(20)
        started = trio.current_time()
        with pytest.raises(ConnectFailed, match="does not answer"):
            await client.connect(id_of(10), [way(1, 10)])
        assert trio.current_time() - started < 6
        assert world.relays[1].ledger.circuits == 0


async def test_a_peer_takes_circuits_only_from_relays_where_it_reserved():
    async with open_world() as world:
        stranger = await world.relay(1)
        await world.relay(2)
        server, reservations = await world.behind(10, 2)
        await (await server.connect(id_of(1), [address(1)])).wait_hello()
        await until(lambda: stranger.live)
        stream = await stranger.open_stream(id_of(10), CIRCUIT_PROTOCOL)
        await stream.send({"type": "circuit", "peer": id_of(20)})
        said = parse((await stream.receive()).header, ALL_ANSWERS)
        assert isinstance(said, Failure)
        assert (said.code, reservations.circuits) == ("not_served", 0)


async def test_a_relay_that_calls_without_naming_the_caller_is_not_waited_for():
    async with open_world() as world:
        relay = await world.relay(1)
        await world.behind(10, 1)
        stream = await relay.open_stream(id_of(10), CIRCUIT_PROTOCOL)
        with pytest.raises(StreamReset) as caught:
            await stream.receive()
        assert caught.value.reason == "unresponsive"


# The ledger.


def some_ip(number):
    from ipaddress import ip_address

    return ip_address(f"8.{number // 256}.{number % 256}.8")


def test_a_network_gets_a_quarter_of_the_slots_and_private_ones_are_not_told_apart():
    ledger = RelayLedger(RelayLimits(slots=8))
    ledger.reserve(id_of(1), some_ip(1))
    ledger.reserve(id_of(2), some_ip(1))
    with pytest.raises(Overloaded, match=r"8\.0\.1\.0/24 has 2"):
        ledger.reserve(id_of(3), some_ip(1))
    for number in range(4, 9):
        ledger.reserve(id_of(number), None)
    ledger.reserve(id_of(3), some_ip(2))
    with pytest.raises(Overloaded, match="no slot free"):
        ledger.reserve(id_of(9), some_ip(3))


def test_renewing_from_another_address_moves_the_slot_and_a_refusal_changes_nothing():
    ledger = RelayLedger(RelayLimits(slots=4))
    ledger.reserve(id_of(1), some_ip(1))
    ledger.reserve(id_of(2), some_ip(2))
    with pytest.raises(Overloaded):
        ledger.reserve(id_of(1), some_ip(2))
    assert ledger.slots == 2
    ledger.reserve(id_of(1), some_ip(3))
    ledger.reserve(id_of(3), some_ip(1))
    assert ledger.slots == 3
    for number in (1, 2, 3):
        ledger.release(id_of(number))
    assert (ledger.slots, len(ledger._slots_by_network)) == (0, 0)


def test_a_network_gets_twice_the_circuits_of_a_caller_however_many_names_it_has():
    ledger = RelayLedger(RelayLimits(circuits_a_caller=2))
    held = [ledger.circuit(id_of(number), some_ip(1), id_of(40), now=0) for number in range(5)]
    for one in held[:4]:
        one.__enter__()
    with pytest.raises(Overloaded), held[4]:
        pass
    for one in held[:4]:
        one.__exit__(None, None, None)
    counters = (ledger._by_caller, ledger._by_caller_network, ledger._by_reserved)
    assert (ledger.circuits, *map(len, counters)) == (0,) * 4


def test_names_are_remembered_in_a_bounded_number():
    ledger = RelayLedger(RelayLimits())
    for number in range(10_000):
        with ledger.circuit(f"peer {number}", None, id_of(1), now=float(number)):
            pass
    assert len(ledger._calls._buckets) == 4096


async def test_the_dialler_is_told_that_the_relay_refused():
    async with open_world() as world:
        await world.relay(1, circuits=0)
        await world.behind(10, 1)
        client = await world.start(20)
        with pytest.raises(ConnectFailed, match="no circuit free: this relay has 0"):
            await client.connect(id_of(10), [way(1, 10)])
