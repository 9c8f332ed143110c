"""Websockets against servers and clients that are not ours."""

from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio
from wsproto import ConnectionType, WSConnection
from wsproto.events import BytesMessage, Ping, Pong, Request, TextMessage

from peerd.net.connections import open_connections
from peerd.net.websockets.channel import MAX_MESSAGE_BYTES, SUBPROTOCOL
from peerd.net.websockets.transport import WebSocketTransport
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ConnectFailed, PeerFault, RemoteProtocolError, VersionMismatch
from peerd.protocol.identity import Identity
from tests.fakes.channels import LOOPBACK, dial, echo, listening, real_time


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
        with pytest.raises(ConnectFailed, match=r"status 200|hung up"):
            async with dial(WebSocketTransport(), address):
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
            async with dial(WebSocketTransport(), address):
                pass


class Client:
    """A websocket client that does what it is told."""

    def __init__(self, stream):
        self.stream = stream
        self.websocket = WSConnection(ConnectionType.CLIENT)
        # What the server answered to the upgrade.
        self.answer = None

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
    async with listening(echo) as bound, Client.connect(bound, ["peerd.2"]) as client:
        assert client.answer.status_code == 426
        assert b"peerd.1" in (await client.hear()).data


@real_time
async def test_a_web_page_is_refused():
    headers = [(b"Origin", b"https://example.org")]
    async with listening(echo) as bound, Client.connect(bound, headers=headers) as client:
        assert client.answer.status_code == 403


@real_time
async def test_websocket_pings_are_answered_beside_messages():
    async with listening(echo) as bound, Client.connect(bound) as client:
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

    async with listening(read) as bound, Client.connect(bound) as client:
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
    async with listening(read) as bound:
        async with await trio.open_tcp_stream(bound.host, bound.port) as stream:
            await stream.send_all(request + headers + b"\r\n5\r\nhello\r\n0\r\n\r\n")
            await stream.receive_some()
        with trio.fail_after(5):
            await ended.wait()
    assert [type(one) for one in heard if not isinstance(one, PeerFault)] in ([], [bytes])
    assert len(heard) == 1


@real_time
async def test_a_message_in_a_few_parts_with_pings_between_comes_whole():
    async with listening(echo) as bound, Client.connect(bound) as client:
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

    async with listening(read) as bound:
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
