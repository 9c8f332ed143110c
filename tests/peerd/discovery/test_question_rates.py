"""Peers that ask the DHT, or store in it, faster than peerd itself does."""

from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from ipaddress import ip_address
from random import Random

import pytest
import trio

from peerd.discovery.dht_streams import StreamTransport, answer_question
from peerd.discovery.question_rates import (
    QUESTIONS_A_SECOND,
    QUESTIONS_AT_ONCE,
    RECORDS_A_SECOND,
    RECORDS_AT_ONCE,
    QuestionRates,
)
from peerd.net.connections import open_connections
from peerd.net.limits.owners import Owner
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import Overloaded
from peerd.protocol.identity import Identity
from peerd.routing.dht.dht import Dht
from peerd.routing.dht.messages import DHT_PROTOCOL, MAX_STORED_AT_ONCE, FindNode, Packet, Store
from peerd.routing.dht.store import RecordStore
from peerd.routing.dht.table import Contact
from peerd.testing.network import MemoryNetwork

HOST = "8.8.8.8"
ADDRESS = Multiaddr("ip4", HOST, 31330)
IDENTITY = Identity.from_seed(b"1" * 32)
CONTACT = Contact(IDENTITY.peer_id, (ADDRESS,))
QUESTION = Packet(FindNode(bytes(20)).to_header())
JUNK = Packet(Store(bytes(20)).to_header(), (b"no record",) * MAX_STORED_AT_ONCE)


@asynccontextmanager
async def _host():
    """A peer that answers questions, and a function that gives another peer at an IP address its transport."""
    network = MemoryNetwork(latency_s=0.001)
    async with AsyncExitStack() as stack:

        async def connections(ip, identity, **arguments):
            return await stack.enter_async_context(
                open_connections(identity, transport=network.transport(ip), handlers={}, **arguments)
            )

        host = await connections(HOST, IDENTITY, listen=[ADDRESS])
        dht = Dht(
            host.peer_id,
            StreamTransport(host),
            RecordStore(trio.current_time),
            now=trio.current_time,
            random=Random(1),
            addresses=[ADDRESS],
        )
        host.handle(DHT_PROTOCOL, partial(answer_question, dht, QuestionRates()))

        async def asker(ip):
            return StreamTransport(await connections(ip, Identity.generate()))

        yield asker


async def _ask_for(seconds, transport, packet, lanes=8):
    """Ask as fast as a connection allows. Returns how many questions were answered, and how many refused."""
    counts = [0, 0]

    async def ask_on():
        while True:
            try:
                await transport.request(CONTACT, packet)
                counts[0] += 1
            except Overloaded:
                counts[1] += 1
            # Just below what a connection may open.
            await trio.sleep(lanes / 500)

    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for _ in range(lanes):
                nursery.start_soon(ask_on)
    return counts


@pytest.mark.parametrize(
    ("packet", "amount", "rate", "burst"),
    [
        (QUESTION, 1, QUESTIONS_A_SECOND, QUESTIONS_AT_ONCE),
        (JUNK, MAX_STORED_AT_ONCE, RECORDS_A_SECOND, RECORDS_AT_ONCE),
    ],
    ids=["questions", "records"],
)
async def test_a_peer_that_asks_without_end_is_refused_and_others_are_answered(packet, amount, rate, burst):
    async with _host() as asker:
        stranger, honest = await asker("7.7.7.7"), await asker("9.9.9.9")
        answered, refused = await _ask_for(6, stranger, packet)
        assert answered * amount == pytest.approx(burst + 6 * rate, rel=0.05)
        assert refused
        await honest.request(CONTACT, packet)
        # It may go on as soon as it has waited.
        await trio.sleep(amount / rate)
        await stranger.request(CONTACT, packet)


def test_new_keys_let_a_network_ask_no_more_than_two_peers():
    rates = QuestionRates()
    owners = [Owner.at(Identity.generate().peer_id, ip_address(f"7.7.7.{number}")) for number in range(4)]
    answered = 0
    for tick in range(400):
        answered += sum(rates.may_ask(owner, tick / 100) for owner in owners for _ in range(10))
    assert answered == pytest.approx(2 * (QUESTIONS_AT_ONCE + 4 * QUESTIONS_A_SECOND), rel=0.01)
    assert rates.may_ask(Owner.at(Identity.generate().peer_id, ip_address("9.9.9.9")), 4.0)


def test_the_most_that_peerd_asks_one_peer_is_never_refused():
    """What `question_rates.py` says of a server with 128 keys that uses seven models, for a minute, after it joined."""
    rates, owner = QuestionRates(), Identity.generate()
    now = 0.0
    peer = Owner(owner.peer_id, "8.8.8.0/24")
    assert all(rates.may_ask(peer, now) for _ in range(256 + 160))
    for second in range(60):
        now = float(second)
        if second % 2 == 0:
            assert all(rates.may_ask(peer, now) and rates.may_store(peer, 1, now) for _ in range(128))
            assert all(rates.may_ask(peer, now) for _ in range(64))
        if second % 3 == 0:
            assert all(rates.may_ask(peer, now) for _ in range(7 * 8))
