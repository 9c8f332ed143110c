"""Every protocol that a peer serves, against every way of ending or breaking a message, at every moment.

Tests are strict (PEERD_STRICT=1), so an unexpected exception fails here instead of ending a connection.
"""

from contextlib import asynccontextmanager
from functools import partial
from random import Random

import pytest
import trio

from peerd.discovery.dht_streams import StreamTransport, answer_question
from peerd.discovery.question_rates import QuestionRates
from peerd.net.connections import open_connections
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.frames import OpenFrame, Priority, ResetFrame, encode_frame
from peerd.protocol.errors import PeerdError, PeerFault
from peerd.protocol.identity import Identity
from peerd.protocol.messages.adapters import ADAPTER_PROTOCOL
from peerd.protocol.messages.dialback import DIALBACK_PROTOCOL
from peerd.protocol.messages.punch import PUNCH_PROTOCOL
from peerd.protocol.messages.relay import CIRCUIT_PROTOCOL, RELAY_PROTOCOL
from peerd.protocol.messages.session import INFER_PROTOCOL, LINK_PROTOCOL, PROGRESS_PROTOCOL
from peerd.protocol.messages.span_training import SPAN_PROTOCOL
from peerd.protocol.messages.training import PASS_PROTOCOL
from peerd.reach.dialback import DialbackAnswerer, ask_to_be_dialled
from peerd.reach.puncher import Puncher
from peerd.reach.relay import Relay
from peerd.reach.relay_ledger import RelayLimits
from peerd.reach.reservations import Reservations
from peerd.routing.dht.dht import Dht
from peerd.routing.dht.messages import DHT_PROTOCOL
from peerd.routing.dht.store import RecordStore
from peerd.routing.dht.table import Contact
from peerd.testing.hostile import HostilePeer, hello_message, message_bytes
from peerd.testing.network import MemoryNetwork

EPOCH = 1_800_000_000.0
MODEL = bytes(range(32))
STRANGER = Identity.from_seed(b"a stranger".ljust(32))
SOMEBODY = Identity.from_seed(b"somebody else".ljust(32)).peer_id
SESSION = bytes(16)
# What an honest peer says first in each protocol.
FIRST = {
    RELAY_PROTOCOL: ({"type": "reserve"}, {"type": "connect", "peer": str(SOMEBODY)}),
    CIRCUIT_PROTOCOL: ({"type": "incoming", "peer": str(SOMEBODY)},),
    DIALBACK_PROTOCOL: ({"type": "dial_me", "ports": [1]},),
    PUNCH_PROTOCOL: ({"type": "punch", "at": "/ip4/9.9.9.9/tcp/1/ws"},),
    DHT_PROTOCOL: ({"type": "ping"}, {"type": "find_node", "key": bytes(20)}, {"type": "store", "key": bytes(20)}),
    INFER_PROTOCOL: (
        {
            "type": "open",
            "session": SESSION,
            "hop": 0,
            "epoch": 0,
            "model": MODEL,
            "start": 0,
            "end": 4,
            "max_length": 16,
        },
    ),
    LINK_PROTOCOL: ({"type": "link", "session": SESSION, "ticket": bytes(158)},),
    PASS_PROTOCOL: ({"type": "begin", "model": MODEL, "start": 0, "end": 4},),
    SPAN_PROTOCOL: ({"type": "begin", "model": MODEL, "start": 0, "end": 4},),
    ADAPTER_PROTOCOL: ({"type": "upload", "session": SESSION, "hop": 0, "pairs": 1, "values": 10},),
    PROGRESS_PROTOCOL: ({"type": "ask", "session": SESSION, "hop": 0},),
}
# No message: a header of no bytes.
NONSENSE = bytes(4)
ERROR = message_bytes({"type": "error", "code": "local_protocol", "message": "boo"})
PARTS = {
    "nonsense": lambda good: [NONSENSE],
    "good and nonsense": lambda good: [good + NONSENSE],
    "good, then nonsense": lambda good: [good, NONSENSE],
    "half": lambda good: [good[:-2]],
    "good and half": lambda good: [good + good[: len(good) // 2]],
    "nothing": lambda good: [b""],
    "good": lambda good: [good],
    "twice": lambda good: [good + good],
    "an error": lambda good: [ERROR],
    "good and an error": lambda good: [good + ERROR],
    "no fields": lambda good: [good + message_bytes({})],
    "a body": lambda good: [good[:-4] + (5).to_bytes(4, "big") + b"12345"],
    "a body that does not come": lambda good: [good[:-4] + (2**20).to_bytes(4, "big") + b"1"],
}
ENDS = ("stays", "finishes", "resets", "hangs up")


def now():
    return EPOCH + trio.current_time()


@asynccontextmanager
async def host_of_everything(open_swarm):
    async with open_swarm() as swarm:
        host = await swarm.serve(0, 4)
        connections, transport = host.connections, swarm.network.transport(host.ip)
        addresses = connections.listen_addresses
        connections.present_as(listen_as=addresses)
        dht = Dht(
            host.peer_id,
            StreamTransport(connections),
            RecordStore(now),
            now=now,
            random=Random(1),
            addresses=addresses,
        )
        connections.handlers |= {
            DHT_PROTOCOL: partial(answer_question, dht, QuestionRates()),
            DIALBACK_PROTOCOL: DialbackAnswerer(transport, lambda: addresses).answer,
            RELAY_PROTOCOL: Relay(host.peer_id, RelayLimits()).answer,
            CIRCUIT_PROTOCOL: Reservations(connections, lambda: (), lambda _: None, Random(1)).answer,
            PUNCH_PROTOCOL: Puncher(connections).answer,
        }
        assert connections.handlers.keys() == FIRST.keys()
        yield swarm, host


async def enter(swarm, host, number):
    channel = await swarm.network.transport(f"10.1.{number // 250}.{number % 250 + 1}").dial(
        host.connections.listen_addresses[0]
    )
    peer = HostilePeer(STRANGER, channel)
    await peer.enter(message_bytes(hello_message(now())))
    return peer


async def hear_all(peer):
    try:
        while True:
            await peer.hear()
    except PeerFault:
        return


async def misbehave(peer, protocol, parts, end, credit):
    stream = await peer.open(protocol)
    if not credit:
        stream += 2
        await peer.send(encode_frame(OpenFrame(stream, protocol, Priority.BULK, 0)))
    for part in parts:
        await peer.say(stream, part)
        await trio.sleep(0.1 if len(parts) > 1 else 0)
    if end == "finishes":
        await peer.say(stream, b"", fin=True)
    elif end == "resets":
        await peer.send(encode_frame(ResetFrame(stream, "cancelled")))
    if end != "hangs up":
        await trio.sleep(2)
    await peer.aclose()


@pytest.mark.parametrize("credit", [True, False], ids=["", "no credit"])
@pytest.mark.parametrize("protocol", FIRST)
async def test_no_way_of_breaking_a_question_harms_a_peer(open_swarm, protocol, credit):
    async with host_of_everything(open_swarm) as (swarm, host):
        number = 0
        for first in FIRST[protocol]:
            for parts in PARTS.values():
                for end in ENDS:
                    number += 1
                    peer = await enter(swarm, host, number)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(hear_all, peer)
                        await misbehave(peer, protocol, parts(message_bytes(first)), end, credit)
        # An honest client is served, and nothing is left of what was done.
        caller = await swarm.caller()
        await caller.open(host)
        await trio.sleep(120)
        assert list(host.connections.live) == [caller.identity.peer_id]
        assert host.server.sessions == 1
        # Not a byte of what was begun, or was not read, is held any more.
        assert host.connections.budget.used_bytes == 0


ERRORS: list[type[PeerdError]] = [PeerdError, *PeerdError.__subclasses__(), *PeerFault.__subclasses__()]
CODES = [cls.code for cls in ERRORS]
ANSWERS = [
    *({"type": "error", "code": code, "message": "boo"} for code in dict.fromkeys([*CODES, "internal", "unheard_of"])),
    {"type": "error"},
    {"type": "pong"},
    {"type": "found", "nodes": [], "split": 7},
    {"type": "dialled", "ip": "8.8.8.2", "outcomes": ["reached"] * 9},
    {"type": "reserved"},
    {},
]


@asynccontextmanager
async def a_liar(answer):
    """A peer that asks, and the one that answers everything with `answer`: a function of the stream."""
    network = MemoryNetwork(latency_s=0.01)
    there = Multiaddr("ip4", "8.8.8.1", 1)

    async def handle(stream):
        await stream.receive(max_body=2**20)
        await answer(stream)

    liar = Identity.from_seed(b"a liar".ljust(32))
    handlers = dict.fromkeys((DHT_PROTOCOL, DIALBACK_PROTOCOL, RELAY_PROTOCOL), handle)
    async with (
        open_connections(liar, transport=network.transport("8.8.8.1"), listen=[there], handlers=handlers),
        open_connections(STRANGER, transport=network.transport("8.8.8.2"), handlers={}) as asker,
    ):
        yield asker, Contact(liar.peer_id, (there,))


async def ask_everything(asker, contact):
    transport = StreamTransport(asker)
    dht = Dht(asker.peer_id, transport, RecordStore(now), now=now, random=Random(1))
    await dht.bootstrap([contact])
    await dht.refresh()
    connection = await asker.connect(contact.peer_id, contact.addresses)
    with pytest.raises(PeerdError):
        await ask_to_be_dialled(connection, [1])
    reservations = Reservations(asker, lambda: (contact,), lambda _: None, Random(1))
    with trio.move_on_after(100):
        await reservations._hold(connection)


@pytest.mark.parametrize("said", ANSWERS, ids=lambda said: str(said.get("code", said.get("type"))))
async def test_no_answer_harms_the_asking_peer(said):
    async def answer(stream):
        await stream.send(said)

    async with a_liar(answer) as (asker, contact):
        await ask_everything(asker, contact)


@pytest.mark.parametrize("how", ["finish", "reset", "close", "hang up", "a body"])
async def test_no_end_of_an_answer_harms_the_asking_peer(how):
    async def answer(stream):
        match how:
            case "finish":
                stream.finish()
            case "reset":
                stream.reset("local_protocol")
            case "close":
                stream.connection.close("no_chain", "boo")
            case "hang up":
                stream.connection.close()
            case "a body":
                await stream.send({"type": "pong"}, [bytes(2**20)])

    async with a_liar(answer) as (asker, contact):
        with pytest.raises(PeerdError):
            await ask_to_be_dialled(await asker.connect(contact.peer_id, contact.addresses), [1])
        dht = Dht(asker.peer_id, StreamTransport(asker), RecordStore(now), now=now, random=Random(1))
        assert await dht.bootstrap([contact]) == 0
