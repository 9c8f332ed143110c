"""Two peers behind NATs become directly connected, in a network in memory with NATs of several kinds."""

from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address

import pytest
import trio

from peerd.net.dial_policy import DialPolicy
from peerd.net.live_connections import RETIRED_S
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.hello import Hello
from peerd.protocol.errors import ConnectFailed, StreamReset
from peerd.protocol.messages.punch import PUNCH_PROTOCOL, Now, Punch
from peerd.protocol.messages.relay import Connect, Connected, Reserve
from peerd.protocol.messages.session import Failure
from peerd.reach.own_endpoint import OwnEndpoint
from peerd.reach.puncher import MAX_AT_ONCE, PUNCHES_BURST, Puncher
from tests.fakes.relay_fixture import LISTEN, World, address, ask, id_of, open_world, say, until

CALLER, RESERVED = 20, 10


def inside(number):
    return f"8.8.{number}.8"


def outside(number):
    return f"6.6.{number}.6"


async def start_puncher(world: World, connections):
    """As `open_reach` does."""
    puncher = Puncher(connections)
    connections.handle(PUNCH_PROTOCOL, puncher.answer)
    nursery = await world.stack.enter_async_context(trio.open_nursery())
    world.stack.callback(nursery.cancel_scope.cancel)
    nursery.start_soon(puncher.run)
    return puncher


@asynccontextmanager
async def natted(caller="port_preserving", reserved="port_preserving", *, relays=2, punches=True):
    """Two relays, a caller and a reserved peer behind NATs of these kinds."""
    async with open_world() as world:
        for number, kind in ((CALLER, caller), (RESERVED, reserved)):
            if kind is not None:
                world.network.put_behind_nat(inside(number), outside(number), kind)
        for relay in range(1, relays + 1):
            await world.relay(relay)
        there, _ = await world.behind(RESERVED, *range(1, relays + 1), listen=[LISTEN])
        here = await world.start(CALLER)
        for relay in range(1, relays + 1):
            await here.connect(id_of(relay), [address(relay)])
            await there.connect(id_of(relay), [address(relay)])
        if punches:
            for connections in (here, there):
                await start_puncher(world, connections)
        yield world, here, there


async def call(world, here):
    return await here.connect(id_of(RESERVED), world.ways(RESERVED))


def direct(connections, number):
    connection = connections.live.get(id_of(number))
    return connection is not None and connection.relay is None


async def until_direct(here, there):
    await until(lambda: direct(here, RESERVED) and direct(there, CALLER))


@pytest.mark.parametrize("caller", ["port_preserving", "endpoint_independent", None])
@pytest.mark.parametrize("reserved", ["port_preserving", "endpoint_independent"])
async def test_peers_behind_nats_that_map_each_port_once_meet_directly(caller, reserved):
    async with natted(caller, reserved) as (world, here, there):
        relayed = await call(world, here)
        assert (relayed.way, relayed.far_ip) == ("relayed", ip_address(outside(RESERVED)))
        await until_direct(here, there)
        met = here.live[id_of(RESERVED)]
        assert (met.way, met.remote_ip) == ("punched", ip_address(outside(RESERVED)))
        # The roles stay what they were, though both dialled.
        assert met.dialled
        assert not there.live[id_of(CALLER)].dialled
        assert await ask(here, RESERVED) == b"hi"


@pytest.mark.parametrize(
    ("caller", "reserved"), [("symmetric", "port_preserving"), ("port_preserving", "symmetric"), ("symmetric",) * 2]
)
async def test_a_symmetric_nat_is_recognised_and_the_peers_stay_with_the_relay(caller, reserved):
    async with natted(caller, reserved, relays=3) as (world, here, there):
        connection = await call(world, here)
        await trio.sleep(5)
        assert connection.lost is None
        assert here.live[id_of(RESERVED)] is connection
        assert not [to for _, to in world.network.dialled if to.startswith("6.6.")]
        assert await ask(here, RESERVED) == b"hi"
        # It is remembered: the next call costs no dial.
        connection.close()
        await until(lambda: id_of(CALLER) not in there.live)
        before = len(world.network.dialled)
        await call(world, here)
        await trio.sleep(5)
        assert len(world.network.dialled) == before


@pytest.mark.parametrize("liar", [1, 2, 3])
async def test_one_witness_that_lies_makes_no_nat_symmetric_even_if_it_is_the_relay(liar):
    async with natted(relays=3) as (world, here, there):
        for connections in (here, there):
            lie_about(connections, address(liar))
        await call(world, here)
        await until_direct(here, there)


def lie_about(connections, witness):
    """The peer at this address says that it sees us at another port."""
    meetings = connections.meetings
    seen_by = meetings.seen_by

    @asynccontextmanager
    async def lied(at):
        async with seen_by(at) as seen:
            yield replace(seen, port=seen.port ^ 1) if at.ip == witness.ip else seen

    meetings.seen_by = lied


async def test_without_a_second_witness_two_peers_try_and_know_within_five_seconds_that_they_stay_with_the_relay():
    async with natted("symmetric", "port_preserving", relays=1) as (world, here, _there):
        await call(world, here)
        await until(lambda: world.network.meetings)
        await trio.sleep(5)
        assert not world.network.meetings
        assert not direct(here, RESERVED)
        assert await ask(here, RESERVED) == b"hi"


async def test_a_stream_of_the_relayed_connection_goes_on_and_new_ones_take_the_direct_one():
    async with natted() as (world, here, _there):
        relayed = await call(world, here)
        stream = relayed.open_stream("/echo/1")
        async with stream:
            for number in range(100):
                await stream.send({"n": number}, [b"x" * 1000])
                message = await stream.receive(1 << 20)
                assert (message.header["n"], bytes(message.body)) == (number, b"x" * 1000)
                await trio.sleep(0.05)
            assert here.live[id_of(RESERVED)].way == "punched"
            other = await here.open_stream(id_of(RESERVED), "/echo/1")
            assert other.connection is here.live[id_of(RESERVED)]
            other.reset("closed")
            assert relayed.lost is None
        # Nothing uses it now.
        await trio.sleep(RETIRED_S + 1)
        assert relayed.lost is not None
        assert direct(here, RESERVED)
        assert await ask(here, RESERVED) == b"hi"


async def test_a_relayed_connection_takes_a_place_as_long_as_it_is_open():
    async with natted() as (world, here, there):
        relayed = await call(world, here)
        stream = relayed.open_stream("/echo/1")
        await stream.send({"n": 0})
        await until_direct(here, there)
        # Both relays, the caller, and the caller through a relay.
        there._live._max_live = 4
        assert not there._live.has_room()
        world.network.disconnect(inside(CALLER), inside(RESERVED))
        await until(lambda: id_of(CALLER) not in there.live)
        there._live._max_live = 3
        assert not there._live.has_room()
        stream.reset("closed")
        await until(lambda: there._live.has_room())


async def test_a_peer_that_is_met_was_never_lost():
    async with natted() as (world, here, there):
        lost = []
        await call(world, here)
        with here.watching(lost=lost.append):
            await until_direct(here, there)
            await trio.sleep(RETIRED_S + 2)
        assert lost == []


async def test_a_peer_whose_direct_connection_is_lost_is_reached_through_the_relay_again():
    async with natted() as (world, here, there):
        relayed = await call(world, here)
        stream = relayed.open_stream("/echo/1")
        await stream.send({"n": 0})
        await until_direct(here, there)
        world.network.disconnect(inside(CALLER), inside(RESERVED))
        await until(lambda: id_of(RESERVED) not in here.live)
        assert await ask(here, RESERVED, *world.ways(RESERVED)) == b"hi"
        # The first relayed connection has never noticed.
        assert relayed.lost is None
        stream.reset("closed")


async def test_peers_that_do_not_show_their_address_are_not_met_and_the_relay_names_neither():
    async with natted(punches=False) as (world, here, there):
        here.may_punch = here._dialler._shows_ip = False
        for connections in (here, there):
            await start_puncher(world, connections)
        connection = await call(world, here)
        await trio.sleep(5)
        assert (connection.far_ip, connection.way) == (None, "relayed")
        assert there.live[id_of(CALLER)].far_ip is None
        assert here.live[id_of(RESERVED)] is connection


async def test_a_peer_that_does_not_know_the_protocol_is_left_alone():
    async with natted(punches=False) as (world, here, there):
        await start_puncher(world, there)
        connection = await call(world, here)
        await trio.sleep(5)
        assert here.live[id_of(RESERVED)] is connection
        # Not even the second connections to the relays were made.
        assert sorted(dials_of(world, RESERVED)) == [inside(1), inside(2)]


async def test_a_connection_that_was_only_measured_is_not_punched():
    async with natted() as (world, here, _):
        connection = await call(world, here)
        await connection.measure()
        before = len(world.network.dialled)
        connection.close("measured")
        await trio.sleep(10)
        assert len(world.network.dialled) == before


async def all_meet(world, here, more):
    """Let the caller and `more` others, each behind a NAT of its own, call at once, and meet whom they call."""
    callers = [here]
    for number in range(30, 30 + more):
        world.network.put_behind_nat(inside(number), outside(number))
        callers.append(await world.start(number))
        for relay in (1, 2):
            await callers[-1].connect(id_of(relay), [address(relay)])
        await start_puncher(world, callers[-1])
    before = len(dials_of(world, RESERVED))
    async with trio.open_nursery() as nursery:
        for each in callers:
            nursery.start_soon(call, world, each)
    await until(lambda: all(direct(each, RESERVED) for each in callers))
    return len(dials_of(world, RESERVED)) - before


async def test_a_peer_that_many_call_at_once_meets_all_of_them_and_keeps_one_connection_to_learn_where_it_is():
    async with natted() as (world, here, _):
        # One to each relay, and one to each peer.
        assert await all_meet(world, here, 4) == 2 + 5


async def test_those_for_whom_there_is_no_place_at_first_are_met_a_little_later():
    async with natted() as (world, here, _):
        await all_meet(world, here, MAX_AT_ONCE)


async def test_a_peer_that_is_about_to_end_learns_nothing_more_and_starts_nothing():
    async with natted(punches=False) as (_, here, _there):
        endpoint = OwnEndpoint(here)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint.run)
            await trio.sleep(1)
            async with endpoint.seen_by(here.live[id_of(1)]) as at:
                assert at.host == outside(CALLER)
            nursery.cancel_scope.cancel()
        with pytest.raises(ConnectFailed):
            async with endpoint.seen_by(here.live[id_of(1)]):
                pass


# Peers that want somebody else dialled.


@asynccontextmanager
async def invited(**nats):
    """A reserved peer that asks its caller whatever a test lets it: yields the world, and the stream."""
    async with natted(punches=False, **nats) as (world, here, there):
        await start_puncher(world, here)
        await call(world, here)
        await until(lambda: id_of(CALLER) in there.live)
        stream = there.live[id_of(CALLER)].open_stream(PUNCH_PROTOCOL)
        yield world, stream


def dials_of(world, number):
    return [there for here, there in world.network.dialled if here == inside(number)]


@pytest.mark.parametrize("victim", ["7.7.7.7", "8.8.1.8", "6.6.20.6", "192.168.1.1", "127.0.0.1", "6.6.10.7"], ids=str)
async def test_nobody_is_dialled_whom_the_relay_does_not_see_as_that_peer(victim):
    async with invited() as (world, stream):
        before = dials_of(world, CALLER)
        said = await say(stream, Punch(Multiaddr("ip4", victim, 80)), (Punch, Failure))
        assert isinstance(said, Failure)
        assert said.code == "invalid"
        await trio.sleep(10)
        assert dials_of(world, CALLER) == before
        assert not world.network.meetings


async def test_a_relay_on_the_internet_names_no_address_in_a_private_one():
    async with natted(punches=False) as (world, here, there):
        await start_puncher(world, here)
        # Our swarm has peers in our own network too.
        here.strangers_policy = DialPolicy(lambda: [Multiaddr("ip4", "192.168.1.2", 1)])
        await call(world, here)
        await until(lambda: id_of(CALLER) in there.live)
        here.live[id_of(RESERVED)].far_ip = ip_address("192.168.1.1")
        stream = there.live[id_of(CALLER)].open_stream(PUNCH_PROTOCOL)
        said = await say(stream, Punch(Multiaddr("ip4", "192.168.1.1", 80)), (Punch, Failure))
        assert isinstance(said, Failure)
        assert said.code == "unsupported"


async def test_an_agreed_dial_is_repeated_a_few_times_and_no_more_whatever_the_peer_says():
    async with invited() as (world, stream):
        said = await say(stream, Punch(Multiaddr("ip4", outside(RESERVED), 4444)), (Punch, Failure))
        assert isinstance(said, Punch)
        assert said.at.host == outside(CALLER)
        for _ in range(20):
            try:
                stream.send_nowait(Now().to_header())
            except (StreamReset, trio.ClosedResourceError):
                break
            await trio.sleep(1)
        await trio.sleep(60)
        assert dials_of(world, CALLER).count(outside(RESERVED)) <= 4


async def test_one_peer_cannot_make_another_dial_again_and_again():
    async with invited() as (_world, first):
        codes = []
        for _ in range(PUNCHES_BURST + 3):
            stream = first.connection.open_stream(PUNCH_PROTOCOL)
            said = await say(stream, Punch(Multiaddr("ip4", outside(RESERVED), 4444)), (Punch, Failure))
            codes.append(said.code if isinstance(said, Failure) else "")
            stream.reset("closed")
            await trio.sleep(0.1)
        assert codes == [""] * PUNCHES_BURST + ["overloaded"] * 3


async def test_a_peer_that_never_says_when_is_not_waited_for_and_holds_no_place():
    async with invited() as (_, stream):
        assert isinstance(await say(stream, Punch(Multiaddr("ip4", outside(RESERVED), 4444)), (Punch, Failure)), Punch)
        with trio.fail_after(60), pytest.raises(StreamReset, match="unresponsive"):
            await stream.receive()


MALFORMED = {
    "out of turn": {"type": "now"},
    "no address": {"type": "punch"},
    "no port": {"type": "punch", "at": "/ip4/6.6.10.6/tcp/0/ws"},
    "a name": {"type": "punch", "at": "/dns/example.org/tcp/80/ws"},
    "TLS": {"type": "punch", "at": "/ip4/6.6.10.6/tcp/80/wss"},
    "bytes": {"type": "punch", "at": b"/ip4/6.6.10.6/tcp/80/ws"},
    "a peer": {"type": "punch", "at": "/ip4/6.6.10.6/tcp/80/ws/p2p/" + str(id_of(3))},
    "many": {"type": "punch", "at": ["/ip4/6.6.10.6/tcp/80/ws"] * 100},
    "long": {"type": "punch", "at": "/ip4/6.6.10.6/tcp/80/ws" + " " * 1000},
}


@pytest.mark.parametrize("header", MALFORMED.values(), ids=MALFORMED)
async def test_malformed_requests_end_their_stream_and_nothing_else(header):
    async with invited() as (world, stream):
        before = dials_of(world, CALLER)
        stream.send_nowait(header)
        with pytest.raises(StreamReset, match="protocol"):
            await stream.receive()
        assert stream.connection.lost is None
        assert dials_of(world, CALLER) == before


async def test_only_the_peer_that_was_called_may_ask_and_only_through_the_relay():
    async with natted() as (world, here, there):
        for connections, number in ((here, 1), (there, 1)):
            relay = await connections.connect(id_of(number), [])
            assert relay.relay is None
        # A caller, and a relay, ask a peer that did not call them.
        relayed = await call(world, here)
        stream = relayed.open_stream(PUNCH_PROTOCOL)
        said = await say(stream, Punch(Multiaddr("ip4", outside(CALLER), 4444)), (Punch, Failure))
        assert isinstance(said, Failure)


async def test_at_most_a_few_meetings_run_at_a_time():
    async with natted(punches=False) as (world, here, there):
        puncher = await start_puncher(world, here)
        await call(world, here)
        await until(lambda: id_of(CALLER) in there.live)
        for _ in range(MAX_AT_ONCE):
            await puncher._places.acquire()
        stream = there.live[id_of(CALLER)].open_stream(PUNCH_PROTOCOL)
        said = await say(stream, Punch(Multiaddr("ip4", outside(RESERVED), 4444)), (Punch, Failure))
        assert isinstance(said, Failure)
        assert said.code == "overloaded"


# What a relay tells.


@pytest.mark.parametrize(("reserve", "connect"), [(True, True), (True, False), (False, True), (False, False)])
async def test_a_relay_names_the_address_of_either_end_only_if_both_show_theirs(reserve, connect):
    async with open_world() as world:
        await world.relay(1)
        there, here = await world.start(RESERVED), await world.start(CALLER)
        calls = []

        async def take(stream):
            calls.append((await stream.receive()).header)
            await stream.send({"type": "accepted"})
            await trio.sleep_forever()

        there.handle("/peerd/circuit/1", take)
        holding = await there.open_stream(id_of(1), "/peerd/relay/1", addresses=[address(1)])
        await say(holding, Reserve(shows_ip=reserve))
        calling = await here.open_stream(id_of(1), "/peerd/relay/1", addresses=[address(1)])
        said = await say(calling, Connect(id_of(RESERVED), shows_ip=connect))
        assert isinstance(said, Connected)
        both = reserve and connect
        assert said.ip == (ip_address(inside(RESERVED)) if both else None)
        assert calls[0].get("ip") == (inside(CALLER) if both else None)


async def test_a_hello_says_from_which_port_it_sees_a_peer():
    async with natted("endpoint_independent", punches=False) as (_, here, _there):
        hello = await here.live[id_of(1)].wait_hello()
        assert isinstance(hello, Hello)
        assert hello.observed_port >= 20_000
        async with here.meetings.seen_by(address(1)) as first, here.meetings.seen_by(address(2)) as second:
            assert first == second
            assert first.host == outside(CALLER)
        assert here.meetings.has_reached(ip_address(inside(1)))
        assert not here.meetings.has_reached(ip_address(inside(3)))
