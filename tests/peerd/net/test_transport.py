"""Websockets on real sockets, between our own peers."""

import ssl
import struct
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_address

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from peerd.net.websockets.channel import MAX_MESSAGE_BYTES
from peerd.net.websockets.transport import WebSocketTransport
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ConnectFailed, ConnectionLost
from peerd.protocol.identity import Identity
from tests.fakes.channels import LOOPBACK, dial, echo, listening, real_time


@real_time
@pytest.mark.parametrize("address", [LOOPBACK, Multiaddr.parse("/ip6/::1/tcp/0/ws")], ids=str)
async def test_messages_come_back_whole_and_in_order(address):
    async with listening(echo, address=address) as bound:
        assert bound.port
        async with dial(WebSocketTransport(), bound) as channel:
            for size in (0, 1, 125, 126, 65, MAX_MESSAGE_BYTES):
                await channel.send(b"x" * size)
                assert await channel.receive() == b"x" * size
            assert channel.remote_ip == ip_address(address.host)
            await channel.aclose()


@real_time
@pytest.mark.parametrize("kind", ["dns", "dns4"])
async def test_a_name_is_resolved(kind):
    async with (
        listening(echo) as bound,
        dial(WebSocketTransport(), Multiaddr(kind, "localhost", bound.port)) as channel,
    ):
        await channel.send(b"x")
        assert await channel.receive() == b"x"


@real_time
async def test_what_was_sent_before_closing_is_still_received():
    async def say_and_close(channel):
        await channel.receive()
        for _ in range(10):
            await channel.send(bytes(30_000))

    async with listening(say_and_close) as bound, dial(WebSocketTransport(), bound) as channel:
        await channel.send(b"go")
        await channel.send(b"never read by the other side")
        for _ in range(10):
            assert len(await channel.receive()) == 30_000
        with pytest.raises(ConnectionLost):
            await channel.receive()
        await channel.aclose()


@real_time
async def test_using_a_closed_channel_says_so():
    async with listening(echo) as bound, dial(WebSocketTransport(), bound) as channel:
        await channel.aclose()
        await channel.aclose()
        with pytest.raises(ConnectionLost):
            await channel.send(b"x")
        with pytest.raises(ConnectionLost):
            await channel.receive()


@real_time
async def test_nobody_listening_is_a_failed_dial():
    async with listening(echo) as bound:
        pass
    with pytest.raises(ConnectFailed, match=r"^Connection refused$"):
        async with dial(WebSocketTransport(), bound):
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
            async with dial(WebSocketTransport(), address):
                pass
        nursery.cancel_scope.cancel()


@real_time
async def test_an_address_that_is_taken_is_an_error_of_the_system():
    async with listening(echo) as bound:
        with pytest.raises(OSError, match="in use"):
            await WebSocketTransport().listen(bound, echo, task_status=trio.TASK_STATUS_IGNORED)


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
        async with dial(WebSocketTransport(), Multiaddr.parse(text)):
            pass


@pytest.mark.parametrize(
    ("text", "advice"), [("/ip4/127.0.0.1/tcp/0/wss", "proxy"), ("/dns/localhost/tcp/0/ws", "IP address")]
)
async def test_tls_and_names_are_not_listened_on(text, advice):
    with pytest.raises(OSError, match=advice):
        await WebSocketTransport().listen(Multiaddr.parse(text), echo, task_status=trio.TASK_STATUS_IGNORED)


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

    async with listening(echo) as bound, trio.open_nursery() as nursery:

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
        async with dial(WebSocketTransport(trusting), address) as channel:
            await channel.send(b"x" * 20_000)
            assert await channel.receive() == b"x" * 20_000
            await channel.aclose()
            with pytest.raises(ConnectFailed, match=r"(?i)certificate"):
                async with dial(WebSocketTransport(), address):
                    pass
            nursery.cancel_scope.cancel()
