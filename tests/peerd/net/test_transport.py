"""Transports: websockets on real sockets against well- and ill-behaved peers, and the network in memory."""

import ssl
import struct
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_address

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from wsproto import ConnectionType, WSConnection
from wsproto.events import BytesMessage, Ping, Pong, Request, TextMessage

from peerd.net.connections import open_connections
from peerd.net.limits.gate import Gate
from peerd.net.websocket import MAX_MESSAGE_BYTES, SUBPROTOCOL, WebSocketTransport
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ConnectFailed, ConnectionLost, PeerFault, RemoteProtocolError, VersionMismatch
from peerd.protocol.identity import Identity
from peerd.testing.network import MemoryNetwork
from peerd.trio_tools import open_tasks

LOOPBACK = Multiaddr.parse("/ip4/127.0.0.1/tcp/0/ws")
real_time = pytest.mark.real_time


@asynccontextmanager
async def _listening(handler, transport=None, address=LOOPBACK):
    transport = transport or WebSocketTransport()
    async with trio.open_nursery() as nursery:
        yield await nursery.start(transport.listen, address, handler)
        nursery.cancel_scope.cancel()


async def _echo(channel):
    try:
        while True:
            await channel.send(await channel.receive())
    except PeerFault:
        pass


@asynccontextmanager
async def _dial(transport, address):
    async with open_tasks() as tasks:
        channel = await transport.dial(address, tasks)
        try:
            yield channel
        finally:
            await channel.aclose()


async def _wait(_channel):
    await trio.sleep_forever()


@real_time
@pytest.mark.parametrize("address", [LOOPBACK, Multiaddr.parse("/ip6/::1/tcp/0/ws")], ids=str)
async def test_messages_come_back_whole_and_in_order(address):
    async with _listening(_echo, address=address) as bound:
        assert bound.port
        async with _dial(WebSocketTransport(), bound) as channel:
            for size in (0, 1, 125, 126, 65, MAX_MESSAGE_BYTES):
                await channel.send(b"x" * size)
                assert await channel.receive() == b"x" * size
            assert channel.remote_ip == ip_address(address.host)
            await channel.aclose()


@real_time
@pytest.mark.parametrize("kind", ["dns", "dns4"])
async def test_a_name_is_resolved(kind):
    async with (
        _listening(_echo) as bound,
        _dial(WebSocketTransport(), Multiaddr(kind, "localhost", bound.port)) as channel,
    ):
        await channel.send(b"x")
        assert await channel.receive() == b"x"


@real_time
async def test_what_was_sent_before_closing_is_still_received():
    async def say_and_close(channel):
        await channel.receive()
        for _ in range(10):
            await channel.send(bytes(30_000))

    async with _listening(say_and_close) as bound, _dial(WebSocketTransport(), bound) as channel:
        await channel.send(b"go")
        await channel.send(b"never read by the other side")
        for _ in range(10):
            assert len(await channel.receive()) == 30_000
        with pytest.raises(ConnectionLost):
            await channel.receive()
        await channel.aclose()


@real_time
async def test_using_a_closed_channel_says_so():
    async with _listening(_echo) as bound, _dial(WebSocketTransport(), bound) as channel:
        await channel.aclose()
        await channel.aclose()
        with pytest.raises(ConnectionLost):
            await channel.send(b"x")
        with pytest.raises(ConnectionLost):
            await channel.receive()


@real_time
async def test_nobody_listening_is_a_failed_dial():
    async with _listening(_echo) as bound:
        pass
    with pytest.raises(ConnectFailed, match=str(bound.port)):
        async with _dial(WebSocketTransport(), bound):
            pass


@real_time
async def test_a_listener_that_dies_while_it_accepts_is_a_failed_dial(monkeypatch):
    async def connect_and_be_reset(host, port):
        """The kernel's behaviour when the other process is killed before we read its address."""
        stream = await connect(host, port)
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        return stream

    async def reset(stream):
        stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, struct.pack("ii", 1, 0))

    connect = trio.open_tcp_stream
    monkeypatch.setattr(trio, "open_tcp_stream", connect_and_be_reset)
    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, reset, 0, host="127.0.0.1"))
        address = Multiaddr("ip4", "127.0.0.1", listener.socket.getsockname()[1])
        with pytest.raises(ConnectFailed, match="not connected"):
            async with _dial(WebSocketTransport(), address):
                pass
        nursery.cancel_scope.cancel()


@real_time
async def test_an_address_that_is_taken_is_an_error_of_the_system():
    async with _listening(_echo) as bound:
        with pytest.raises(OSError, match="in use"):
            await WebSocketTransport().listen(bound, _echo, task_status=trio.TASK_STATUS_IGNORED)


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/0.0.0.0/tcp/1/ws",
        "/ip4/127.0.0.1/tcp/0/ws",
        f"/ip4/127.0.0.1/tcp/1/ws/p2p/{Identity.from_seed(b'1' * 32).peer_id}/p2p-circuit",
    ],
)
async def test_what_is_no_direct_address_is_not_dialled(text):
    with pytest.raises(ConnectFailed, match="cannot be dialled"):
        async with _dial(WebSocketTransport(), Multiaddr.parse(text)):
            pass


@pytest.mark.parametrize(
    ("text", "advice"), [("/ip4/127.0.0.1/tcp/0/wss", "proxy"), ("/dns/localhost/tcp/0/ws", "IP address")]
)
async def test_tls_and_names_are_not_listened_on(text, advice):
    with pytest.raises(OSError, match=advice):
        await WebSocketTransport().listen(Multiaddr.parse(text), _echo, task_status=trio.TASK_STATUS_IGNORED)


# Servers that are not ours.


@asynccontextmanager
async def _serving_bytes(answer):
    """A TCP server that reads a request and says `answer`."""

    async def serve(stream):
        await stream.receive_some()
        await stream.send_all(answer)

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield Multiaddr("ip4", "127.0.0.1", listener.socket.getsockname()[1])
        nursery.cancel_scope.cancel()


def _switching(header):
    """What a server says that turns a connection into a websocket, but for a header that is wrong."""
    right = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Accept": "?",
        "Sec-WebSocket-Protocol": "peerd.1",
    }
    name, value = header.split(": ")
    lines = [f"{name}: {value}" for name, value in (right | {name: value}).items()]
    return "\r\n".join(["HTTP/1.1 101 Switching Protocols", *lines, "", ""]).encode("latin-1")


@real_time
async def test_a_refusal_without_end_is_not_read():
    read = 0

    async def serve(stream):
        nonlocal read
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        with suppress(trio.BrokenResourceError):
            while True:
                await stream.send_all(bytes(2**16))
                read += 2**16

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        address = Multiaddr("ip4", "127.0.0.1", listener.socket.getsockname()[1])
        with trio.fail_after(3), pytest.raises(ConnectFailed, match=r"status 200|hung up"):
            async with _dial(WebSocketTransport(), address):
                pass
        nursery.cancel_scope.cancel()
    # What the system's buffers held, and no more.
    assert read < 2**24


@real_time
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", ConnectFailed),
        (b"SSH-2.0-OpenSSH_9.7\r\n", ConnectFailed),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", ConnectFailed),
        (b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\n\r\n", VersionMismatch),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", ConnectFailed),
        # With a blank line the HTTP library sees a whole answer in these, and would have us refuse it as a server does.
        (b"220 mail.example.org ESMTP\r\n\r\n", ConnectFailed),
        (_switching("Sec-WebSocket-Accept: wrong"), ConnectFailed),
        (_switching("Sec-WebSocket-Extensions: unheard-of"), ConnectFailed),
        (_switching("Connection: close"), ConnectFailed),
        (_switching("Sec-WebSocket-Protocol: \xfc"), ConnectFailed),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", ConnectFailed),
        (b"HTTP/1.1 100 Continue\r\n\r\n", ConnectFailed),
        (b"HTTP/1.1 426 Upgrade Required\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n", ConnectFailed),
    ],
    ids=lambda value: repr(value)[2:80] if isinstance(value, bytes) else "",
)
async def test_a_server_that_is_no_peer_is_told_apart(answer, error):
    async with _serving_bytes(answer) as address:
        with trio.fail_after(5), pytest.raises(error):
            async with _dial(WebSocketTransport(), address):
                pass


# Clients that are not ours.


class Client:
    """A websocket client that does what it is told."""

    def __init__(self, stream):
        self.stream = stream
        self.websocket = WSConnection(ConnectionType.CLIENT)

    @classmethod
    @asynccontextmanager
    async def connect(cls, address, subprotocols=(SUBPROTOCOL,), headers=()):
        async with await trio.open_tcp_stream(address.host, address.port) as stream:
            client = cls(stream)
            request = Request(host="x", target="/any", subprotocols=[*subprotocols], extra_headers=[*headers])
            await client.say(request)
            client.answer = await client.hear()
            yield client

    async def say(self, *events):
        for event in events:
            await self.stream.send_all(self.websocket.send(event))

    async def hear(self):
        """The next event; None at the end."""
        while True:
            for event in self.websocket.events():
                return event
            data = await self.stream.receive_some()
            if not data:
                return None
            self.websocket.receive_data(data)


@real_time
async def test_another_version_is_refused_by_name():
    async with _listening(_echo) as bound, Client.connect(bound, ["peerd.2"]) as client:
        assert client.answer.status_code == 426
        assert b"peerd.1" in (await client.hear()).data


@real_time
async def test_a_web_page_is_refused():
    headers = [(b"Origin", b"https://example.org")]
    async with _listening(_echo) as bound, Client.connect(bound, headers=headers) as client:
        assert client.answer.status_code == 403


@real_time
async def test_websocket_pings_are_answered_beside_messages():
    async with _listening(_echo) as bound, Client.connect(bound) as client:
        await client.say(Ping(payload=b"?"), BytesMessage(data=b"x"))
        heard = [await client.hear(), await client.hear()]
        assert {type(event) for event in heard} == {Pong, BytesMessage}


@real_time
@pytest.mark.parametrize(
    "events",
    [
        [BytesMessage(data=bytes(MAX_MESSAGE_BYTES + 1))],
        [BytesMessage(data=bytes(20_000), message_finished=False)] * 2,
        [TextMessage(data="hello")],
    ],
    ids=["oversized", "oversized in parts", "text"],
)
async def test_what_is_no_message_of_ours_is_a_typed_error(events):
    errors = []

    async def read(channel):
        try:
            await channel.receive()
        except RemoteProtocolError as error:
            errors.append(error)

    async with _listening(read) as bound, Client.connect(bound) as client:
        await client.say(*events)
        while await client.hear() is not None:
            pass
        assert len(errors) == 1


@real_time
async def test_pings_while_the_listener_closes_harm_nobody():
    """Each connection says what is no handshake, is told goodbye, and PINGs on."""
    identity = Identity.from_seed(b"1" * 32)
    async with open_connections(identity, transport=WebSocketTransport(), listen=[LOOPBACK], handlers={}) as peer:
        [bound] = peer.listen_addresses
        for together in (False, True):
            async with Client.connect(bound) as client:
                data = client.websocket.send(BytesMessage(data=b"x"))
                pings = b"".join(client.websocket.send(Ping(payload=b"?")) for _ in range(20))
                await client.stream.send_all(data + pings if together else data)
                with suppress(trio.BrokenResourceError):
                    for _ in range(20):
                        await client.stream.send_all(pings)
                        await trio.sleep(0.01)
        await _is_still_there(peer, bound)


@real_time
async def test_what_follows_an_oversized_message_harms_nobody():
    identity = Identity.from_seed(b"1" * 32)
    async with open_connections(identity, transport=WebSocketTransport(), listen=[LOOPBACK], handlers={}) as peer:
        [bound] = peer.listen_addresses
        async with Client.connect(bound) as client:
            events = [BytesMessage(data=bytes(MAX_MESSAGE_BYTES + 1)), Ping(payload=b"?"), BytesMessage(data=b"x")]
            await client.stream.send_all(b"".join(map(client.websocket.send, events)))
            while await client.hear() is not None:
                pass
        await _is_still_there(peer, bound)


async def _is_still_there(peer, bound):
    other = Identity.from_seed(b"2" * 32)
    async with open_connections(other, transport=WebSocketTransport(), handlers={}) as dialler:
        await dialler.connect(peer.peer_id, [bound])


@real_time
@pytest.mark.parametrize(
    "headers",
    [
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\n",
        b"Sec-WebSocket-Key: \xff\r\n",
        b"Sec-WebSocket-Protocol: \xff\r\n",
        b"Sec-WebSocket-Extensions: \xff\r\n",
        b"Host: \xff\r\n",
    ],
)
async def test_an_odd_request_is_a_typed_error_or_served(headers):
    heard = []
    ended = trio.Event()

    async def read(channel):
        try:
            heard.append(await channel.receive())
        except PeerFault as error:
            heard.append(error)
        ended.set()

    request = (
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: peerd.1\r\n"
    )
    async with _listening(read) as bound:
        async with await trio.open_tcp_stream(bound.host, bound.port) as stream:
            await stream.send_all(request + headers + b"\r\n5\r\nhello\r\n0\r\n\r\n")
            await stream.receive_some()
        with trio.fail_after(5):
            await ended.wait()
    assert [type(one) for one in heard if not isinstance(one, PeerFault)] in ([], [bytes])
    assert len(heard) == 1


@real_time
async def test_a_message_in_a_few_parts_with_pings_between_comes_whole():
    async with _listening(_echo) as bound, Client.connect(bound) as client:
        for part in range(100):
            await client.say(BytesMessage(data=bytes([part]), message_finished=part == 99), Ping(payload=b"?"))
        while not isinstance(event := await client.hear(), BytesMessage):
            assert isinstance(event, Pong)
        assert event.data == bytes(range(100))


@real_time
async def test_bytes_that_are_no_http_are_a_typed_error():
    errors = []

    async def read(channel):
        try:
            await channel.receive()
        except PeerFault as error:
            errors.append(error)

    async with _listening(read) as bound:
        async with await trio.open_tcp_stream(bound.host, bound.port) as stream:
            await stream.send_all(b"\x16\x03\x01 hello, is this TLS?\r\n\r\n")
            while await stream.receive_some():
                pass
        assert len(errors) == 1


@real_time
async def test_garbage_in_place_of_a_handshake_is_shown_the_door_and_the_daemon_lives_on():
    identity = Identity.from_seed(b"1" * 32)
    async with open_connections(identity, transport=WebSocketTransport(), listen=[LOOPBACK], handlers={}) as peer:
        [bound] = peer.listen_addresses
        for garbage in (b"", bytes(32), bytes(1025), bytes(MAX_MESSAGE_BYTES), bytes(MAX_MESSAGE_BYTES + 1)):
            async with Client.connect(bound) as client:
                await client.say(BytesMessage(data=garbage))
                while await client.hear() is not None:
                    pass
        async with open_connections(
            Identity.from_seed(b"2" * 32), transport=WebSocketTransport(), handlers={}
        ) as other:
            await other.connect(peer.peer_id, [bound])


# TLS, ended by a proxy.


def _self_signed(folder):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


async def _pump(source, sink):
    with trio.move_on_after(10):
        try:
            while data := await source.receive_some():
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        await sink.aclose()


@real_time
async def test_wss_goes_through_a_proxy_that_ends_tls_and_checks_its_certificate(tmp_path):
    pem = _self_signed(tmp_path)
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(pem)
    trusting = ssl.create_default_context(cafile=pem)

    async with _listening(_echo) as bound, trio.open_nursery() as nursery:

        async def proxy(outer):
            try:
                await outer.do_handshake()
            except trio.BrokenResourceError:
                return
            inner = await trio.open_tcp_stream(bound.host, bound.port)
            async with trio.open_nursery() as pumps:
                pumps.start_soon(_pump, outer, inner)
                await _pump(inner, outer)

        [listener] = await nursery.start(
            partial(trio.serve_ssl_over_tcp, proxy, 0, server_side, host="127.0.0.1", https_compatible=True)
        )
        port = listener.transport_listener.socket.getsockname()[1]
        address = Multiaddr("dns4", "localhost", port, secure=True)
        async with _dial(WebSocketTransport(trusting), address) as channel:
            await channel.send(b"x" * 20_000)
            assert await channel.receive() == b"x" * 20_000
            await channel.aclose()
            with pytest.raises(ConnectFailed, match=r"(?i)certificate"):
                async with _dial(WebSocketTransport(), address):
                    pass
            nursery.cancel_scope.cancel()


# The door.


def test_strangers_are_counted_in_all_and_by_public_address():
    gate = Gate(max_unproven=10, max_an_address=2)
    public, neighbour = ip_address("8.8.8.8"), ip_address("8.8.4.4")
    assert [gate.enter(public) for _ in range(3)] == [True, True, False]
    assert gate.enter(neighbour)
    gate.leave(public)
    assert gate.enter(public)
    assert [gate.enter(ip_address("127.0.0.1")) for _ in range(8)] == [True] * 7 + [False]


def test_one_host_has_a_whole_network_of_ipv6_addresses_and_counts_once():
    gate = Gate(max_an_address=2)
    addresses = [ip_address(f"2a00:1450:4001:81c::{n}") for n in range(1, 4)]
    assert [gate.enter(address) for address in addresses] == [True, True, False]
    assert gate.enter(ip_address("2a00:1450:4001:81d::1"))


async def test_silent_strangers_are_shown_the_door_after_ten_seconds_and_cannot_fill_it():
    network = MemoryNetwork()
    identity = Identity.from_seed(b"1" * 32)
    address = Multiaddr("ip4", "8.8.8.8", 1)
    async with open_connections(
        identity, transport=network.transport("8.8.8.8"), listen=[address], handlers={}
    ) as peer:
        strangers = [await network.transport("1.1.1.1").dial(address) for _ in range(20)]
        await trio.sleep(1)
        assert "unproven=8" in repr(peer)
        async with open_connections(
            Identity.from_seed(b"2" * 32), transport=network.transport("9.9.9.9"), handlers={}
        ) as other:
            await other.connect(peer.peer_id, [address])
            await trio.sleep(1)
            assert "unproven=8" in repr(peer)
        await trio.sleep(9)
        assert "unproven=0" in repr(peer)
        for stranger in strangers:
            with pytest.raises(ConnectionLost):
                await stranger.receive()


# The network in memory.


@asynccontextmanager
async def _memory(**arguments):
    """A network, and a channel from 10.0.0.1 to an echo on 10.0.0.2."""
    network = MemoryNetwork(**arguments)
    async with _listening(_echo, network.transport("10.0.0.2"), Multiaddr("ip4", "0.0.0.0", 7)):
        yield network, await network.transport("10.0.0.1").dial(Multiaddr("ip4", "10.0.0.2", 7))


async def test_in_memory_a_message_takes_the_latency_each_way():
    async with _memory() as (network, channel):
        network.set_latency("10.0.0.1", "10.0.0.2", 0.25)
        start = trio.current_time()
        await channel.send(b"x")
        assert trio.current_time() == start
        assert await channel.receive() == b"x"
        assert trio.current_time() == start + 0.5


async def test_in_memory_a_slow_line_makes_the_sender_wait():
    async with _memory(bytes_a_second=1000.0) as (_, channel):
        start = trio.current_time()
        await channel.send(bytes(500))
        assert trio.current_time() == start + 0.5
        await channel.receive()
        assert trio.current_time() == start + 1


async def test_in_memory_a_reader_that_does_not_read_makes_the_sender_wait():
    network = MemoryNetwork()
    async with _listening(_wait, network.transport("10.0.0.2"), Multiaddr("ip4", "10.0.0.2", 7)) as address:
        channel = await network.transport("10.0.0.1").dial(address)
        with trio.move_on_after(1) as waited:
            for _ in range(1000):
                await channel.send(bytes(1000))
        assert waited.cancelled_caught
        network.kill("10.0.0.2")
        with pytest.raises(ConnectionLost, match="killed"):
            await channel.send(b"x")


async def test_in_memory_a_partition_tells_nobody_and_heals():
    async with _memory() as (network, channel):
        network.partition("10.0.0.1", "10.0.0.2")
        await channel.send(b"x")
        with trio.move_on_after(100) as waited:
            await channel.receive()
        assert waited.cancelled_caught
        network.heal("10.0.0.1", "10.0.0.2")
        assert await channel.receive() == b"x"


async def test_in_memory_nobody_dials_across_a_partition_or_a_closed_port():
    async with _memory() as (network, _):
        with pytest.raises(ConnectFailed, match="refused"):
            await network.transport("10.0.0.1").dial(Multiaddr("ip4", "10.0.0.2", 8))
        network.partition("10.0.0.1", "10.0.0.2")
        with pytest.raises(trio.TooSlowError), trio.fail_after(100):
            await network.transport("10.0.0.1").dial(Multiaddr("ip4", "10.0.0.2", 7))


async def test_in_memory_what_was_sent_before_closing_is_still_received():
    async def say_and_close(channel):
        await channel.send(b"bye")

    network = MemoryNetwork(latency_s=0.1)
    async with _listening(say_and_close, network.transport("10.0.0.2"), Multiaddr("ip4", "10.0.0.2", 0)) as address:
        channel = await network.transport("10.0.0.1").dial(address)
        assert await channel.receive() == b"bye"
        with pytest.raises(ConnectionLost, match="closed"):
            await channel.receive()
        with pytest.raises(OSError, match="in use"):
            network.bind("10.0.0.2", address.port, None, _echo)
