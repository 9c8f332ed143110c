"""Which IP addresses and names may be dialled when a stranger names them."""

from __future__ import annotations

import socket
import threading
from contextlib import asynccontextmanager
from ipaddress import ip_address

import pytest
import trio

from peerd.net.connections import open_connections
from peerd.net.dial_policy import ANYWHERE, DialPolicy, DialRules
from peerd.net.dialling.names import Names, connect_to_any
from peerd.net.websockets.transport import WebSocketTransport
from peerd.peer_parts import dial_rules
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ConnectFailed
from peerd.protocol.identity import Identity
from peerd.routing.reach.verdict import Whereabouts
from peerd.testing.network import MemoryNetwork
from peerd.trio_tools import Watched


def addresses(*texts: str) -> tuple[Multiaddr, ...]:
    return tuple(Multiaddr.parse(text) for text in texts)


LOOPBACK, LAN, OTHER_LAN, PUBLIC = addresses(
    "/ip4/127.0.0.1/tcp/9/ws", "/ip4/192.168.1.9/tcp/9/ws", "/ip4/10.9.9.9/tcp/9/ws", "/ip4/93.184.216.34/tcp/9/ws"
)
HIDDEN = addresses(
    "/ip6/64:ff9b::c0a8:109/tcp/9/ws",
    "/ip6/::1/tcp/9/ws",
    "/ip6/fe80::1/tcp/9/ws",
    "/ip6/fc00::1/tcp/9/ws",
    "/ip4/169.254.169.254/tcp/80/ws",
    "/ip4/224.0.0.1/tcp/80/ws",
)


@pytest.mark.parametrize(
    ("ours", "allowed"),
    [
        ((), {PUBLIC}),
        (addresses("/ip4/93.184.216.1/tcp/1/ws"), {PUBLIC}),
        (addresses("/ip4/192.168.7.1/tcp/1/ws"), {PUBLIC, LAN}),
        (addresses("/ip4/10.0.0.1/tcp/1/ws"), {PUBLIC, OTHER_LAN}),
        (addresses("/ip4/127.0.0.1/tcp/1/ws"), {PUBLIC, LOOPBACK}),
        # Listening on all interfaces does not count as being in any range.
        (addresses("/ip4/0.0.0.0/tcp/1/ws"), {PUBLIC}),
    ],
)
def test_private_addresses_may_be_dialled_only_from_the_same_range(ours, allowed):
    assert set(DialPolicy(lambda: ours).of((LOOPBACK, LAN, OTHER_LAN, PUBLIC))) == allowed


def test_a_private_address_hides_in_no_other_form():
    assert DialPolicy(lambda: addresses("/ip4/192.168.7.1/tcp/1/ws")).of((*HIDDEN, PUBLIC)) == (PUBLIC,)


def test_our_operators_addresses_may_lead_anywhere():
    assert ANYWHERE.of((LOOPBACK, LAN, *HIDDEN)) == (LOOPBACK, LAN, *HIDDEN)


# Names.


@pytest.fixture
def resolver(monkeypatch):
    """Resolves names as the test says: a list of IP addresses for each name, the next one at each lookup."""
    answers: dict[str, list[list[str]]] = {}

    real = socket.getaddrinfo

    def look_up(host, port, *args, **more):
        if host not in answers:
            return real(host, port, *args, **more)
        ips = answers[host].pop(0) if len(answers[host]) > 1 else answers[host][0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ips]

    monkeypatch.setattr("peerd.net.dialling.names.socket.getaddrinfo", look_up)
    return answers


STRANGERS = DialPolicy(lambda: addresses("/ip4/93.184.216.1/tcp/1/ws"))


async def test_a_name_is_what_it_leads_to(resolver):
    resolver["printer.example"] = [["127.0.0.1", "192.168.1.1", "93.184.216.34"]]
    name = Multiaddr("dns", "printer.example", 80)
    assert await Names().permitted(name, STRANGERS) == [ip_address("93.184.216.34")]
    assert len(await Names().permitted(name, ANYWHERE)) == 3
    resolver["printer.example"] = [["127.0.0.1"]]
    with pytest.raises(ConnectFailed, match="private network"):
        await Names().permitted(name, STRANGERS)


@asynccontextmanager
async def listener(host="127.0.0.1"):
    """A listening port, and how often it was dialled."""
    came: list[int] = []
    [listening] = await trio.open_tcp_listeners(0, host=host)

    async def count(stream: trio.SocketStream) -> None:
        came.append(1)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, count, [listening])
        yield listening.socket.getsockname()[1], came
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("secure", [False, True])
async def test_what_was_checked_is_what_is_dialled(resolver, monkeypatch, secure):
    """A name leads elsewhere at its second lookup."""
    async with listener() as (port, came):
        resolver["rebinds.example"] = [["93.184.216.34"], ["127.0.0.1"]]
        name = Multiaddr("dns", "rebinds.example", port, secure=secure)
        dialled = []

        async def connect(ips, port):
            dialled.extend(map(str, ips))
            raise OSError("nobody there")

        monkeypatch.setattr("peerd.net.websockets.transport.connect_to_any", connect)
        async with trio.open_nursery() as nursery:
            with pytest.raises(ConnectFailed):
                await WebSocketTransport().dial(name, nursery, STRANGERS)
        assert dialled == ["93.184.216.34"]
        assert not came


async def test_the_first_address_of_a_name_may_be_dead():
    async with listener() as (port, came):
        # Nothing listens at the first address; the second works.
        stream = await connect_to_any([ip_address("127.0.0.9"), ip_address("127.0.0.1")], port)
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert came


async def test_where_nobody_answers_the_first_reason_is_told():
    with pytest.raises(OSError, match="connect"):
        await connect_to_any([ip_address("127.0.0.9")], 1)


@pytest.mark.parametrize("answering", [1, 2])
async def test_a_caller_cancelled_as_streams_connect_leaves_none_open(monkeypatch, answering):
    """A search that nobody needs any more ends in the very turn of the loop in which a stream connects."""
    connected = []
    connect = trio.open_tcp_stream
    async with listener() as (port, _came):
        with trio.CancelScope() as caller:

            async def connect_and_cancel(host, port):
                stream = await connect(host, port)
                connected.append(stream)
                if len(connected) == answering:
                    caller.cancel()
                else:
                    with trio.CancelScope(shield=True):
                        await other.wait()
                other.set()
                return stream

            other = trio.Event()
            monkeypatch.setattr("peerd.net.dialling.names.STAGGER_S", 0.01)
            monkeypatch.setattr("peerd.net.dialling.names.trio.open_tcp_stream", connect_and_cancel)
            await connect_to_any([ip_address("127.0.0.1")] * 2, port)
    assert caller.cancelled_caught
    assert [stream.socket.fileno() for stream in connected] == [-1] * answering


async def test_certificates_that_cannot_be_read_leave_no_stream_open(monkeypatch):
    async with listener() as (port, _came):
        streams = []

        async def connect(ips, port):
            streams.append(await connect_to_any(ips, port))
            return streams[0]

        def unreadable():
            raise FileNotFoundError(2, "No such file or directory")

        monkeypatch.setattr("peerd.net.websockets.transport.connect_to_any", connect)
        monkeypatch.setattr("peerd.net.websockets.transport.ssl.create_default_context", unreadable)
        async with trio.open_nursery() as nursery:
            with pytest.raises(ConnectFailed, match="No such file"):
                await WebSocketTransport().dial(Multiaddr("ip4", "127.0.0.1", port, secure=True), nursery)
        assert streams[0].socket.fileno() == -1


async def test_a_resolver_that_hangs_keeps_no_threads_from_others(monkeypatch):
    """Lookups of strangers' names only delay each other."""
    release = threading.Event()
    monkeypatch.setattr("peerd.net.dialling.names.socket.getaddrinfo", lambda *_args, **_more: release.wait(20) and [])
    names = Names()
    before = trio.to_thread.current_default_thread_limiter().borrowed_tokens

    async def look_up(number: int) -> None:
        with trio.move_on_after(0.05):
            await names.permitted(Multiaddr("dns", f"slow{number}.example", 80), STRANGERS)

    try:
        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(look_up, number)
        assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == before
        assert names._strangers.borrowed_tokens == 4
        assert names._own.borrowed_tokens == 0
    finally:
        release.set()


# With real connections.


async def test_only_our_operators_addresses_lead_into_private_networks():
    network = MemoryNetwork()
    network.names["lan.example"] = "10.0.0.2"
    here, there = Identity.generate(), Identity.generate()
    lan = Multiaddr.parse("/ip4/10.0.0.2/tcp/4000/ws")
    name = Multiaddr("dns", "lan.example", 4000)
    async with (
        open_connections(there, transport=network.transport("10.0.0.2"), listen=[lan], handlers={}),
        open_connections(
            here, transport=network.transport("93.184.216.34"), handlers={}, dial_rules=DialRules(STRANGERS, STRANGERS)
        ) as connections,
        open_connections(
            Identity.generate(),
            transport=network.transport("93.184.216.35"),
            handlers={},
            dial_rules=DialRules(STRANGERS, STRANGERS, (lan,)),
        ) as trusting,
    ):
        for address in (lan, name):
            with pytest.raises(ConnectFailed, match="private network"):
                await connections.connect(there.peer_id, [address])
        assert not network.dialled
        assert await trusting.connect(there.peer_id, [lan])


def test_a_peer_on_the_internet_names_nothing_in_our_networks():
    policy = DialPolicy(lambda: (LAN, LOOPBACK))
    everything = (LOOPBACK, LAN, OTHER_LAN, PUBLIC)
    assert policy.named_from(PUBLIC.ip).of(everything) == (PUBLIC,)
    assert policy.named_from(LAN.ip).of(everything) == policy.named_from(None).of(everything) == (LOOPBACK, LAN, PUBLIC)


@pytest.mark.parametrize(
    ("contacts", "permitted"),
    [
        (addresses("/ip4/192.168.7.1/tcp/1/ws", "/ip4/127.0.0.1/tcp/1/ws"), (LAN, PUBLIC)),
        # All of the swarm that it knows is on this machine.
        (addresses("/ip4/127.0.0.1/tcp/1/ws"), (LOOPBACK, PUBLIC)),
        ((), (PUBLIC,)),
    ],
)
def test_listening_on_all_addresses_lets_nobody_aim_us_at_our_own_machine(contacts, permitted):
    rules = dial_rules((), Watched(Whereabouts(contacts, contacts)))
    assert rules.strangers.of((LOOPBACK, LAN, OTHER_LAN, PUBLIC)) == permitted
