"""Peers that break the rules: nothing ends the server, disturbs an honest session or stays behind."""

from collections import Counter
from contextlib import asynccontextmanager
from functools import partial
from random import Random

import pytest
import torch
import trio

from peerd.client.finding.finder import Patience
from peerd.discovery.dht_streams import StreamTransport, answer_question
from peerd.discovery.question_rates import QuestionRates
from peerd.protocol.connection.frames import CreditFrame, PingFrame, ResetFrame, encode_frame
from peerd.protocol.connection.noise import Handshake
from peerd.protocol.errors import PeerdError, PeerFault
from peerd.protocol.identity import Identity
from peerd.protocol.messages.session import INFER_PROTOCOL
from peerd.protocol.span import Span
from peerd.routing.dht.dht import Dht
from peerd.routing.dht.messages import DHT_PROTOCOL
from peerd.routing.dht.store import RecordStore
from peerd.testing.hostile import (
    HostilePeer,
    Target,
    conversations,
    hello_message,
    message_bytes,
    mutated,
    mutated_bytes,
    mutated_header,
)

WIDTH = 8
MODEL = bytes(range(32))
BLOCKS = Span(0, 4)
EPOCH = 1_800_000_000.0


def now():
    return EPOCH + trio.current_time()


@asynccontextmanager
async def attacked(open_swarm, whole_forward):
    """A host of all protocols and an honest session on it, which is exact to the end and leaves nothing behind."""
    async with open_swarm() as swarm:
        host = await swarm.serve(BLOCKS.start, BLOCKS.end, kv_tokens=8192)
        store = RecordStore(now)
        dht = Dht(
            host.peer_id,
            StreamTransport(host.connections),
            store,
            now=now,
            random=Random(1),
            addresses=host.connections.listen_addresses,
        )
        host.connections.handlers[DHT_PROTOCOL] = partial(answer_question, dht, QuestionRates())
        client = await swarm.client()
        session = await client.session(BLOCKS, max_length=1024, patience=Patience(missing_s=0))
        row = tokens(1024)
        expected = whole_forward(row, len(BLOCKS))
        steps = 0

        async def decode():
            nonlocal steps
            for position in range(len(row)):
                result = await session.step(row[position : position + 1])
                assert torch.equal(result, expected[position : position + 1])
                steps += 1
                await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(decode)
            yield swarm, host
            nursery.cancel_scope.cancel()
        assert steps
        assert session.failovers == 0
        session.close()
        # Handshakes end, lingering sessions end, silent connections end.
        await trio.sleep(120)
        assert set(host.connections.live) <= {client.identity.peer_id}
        assert host.server.sessions == 0
        assert host.task.engine.free_tokens == 8192
        for connection in host.connections.live.values():
            assert "streams=0" in repr(connection)


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 251, (count, WIDTH), generator=generator).float()


def identity(number):
    return Identity.from_seed(b"hostile" + number.to_bytes(25, "big"))


def target(host):
    return Target(host.peer_id, MODEL, host.span, WIDTH)


async def dial(swarm, host, number):
    transport = swarm.network.transport(f"10.1.{number // 250}.{number % 250 + 1}")
    return await transport.dial(host.connections.listen_addresses[0])


async def enter(swarm, host, number):
    """A hostile peer that is let in, listening."""
    peer = HostilePeer(identity(number), await dial(swarm, host, number))
    await peer.enter(message_bytes(hello_message(now())))
    return peer


async def listen(peer, heard=None):
    """Take what the peer is sent, which an attacker that wants to stay must."""
    try:
        while True:
            frame = await peer.hear()
            if heard is not None:
                heard.append(frame)
    except PeerFault:
        return


async def ended(channel):
    """Why a channel ends, once it has."""
    try:
        while True:
            await channel.receive()
    except PeerFault as error:
        return error


async def test_conversations_without_a_change_are_what_an_honest_peer_says(open_swarm, whole_forward):
    async with attacked(open_swarm, whole_forward) as (swarm, host):
        peer = await enter(swarm, host, 1)
        heard = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, peer, heard)
            for protocol, messages in conversations(identity(1), target(host), b"h" * 16, now(), Random(1)):
                stream = await peer.open(protocol)
                for header, body in messages:
                    await peer.say(stream, message_bytes(header, body), fin=protocol == DHT_PROTOCOL)
                await trio.sleep(1)
            nursery.cancel_scope.cancel()
        # Of its own streams; it takes no link.
        assert not [frame for frame in heard if isinstance(frame, ResetFrame) and frame.stream % 2]
        assert host.connections.live[identity(1).peer_id].lost is None
        # Its two sessions, and the honest one.
        assert host.server.sessions == 3
        await peer.aclose()


async def attack_messages(swarm, host, number, count):
    """`count` conversations with one thing wrong in each, over as few connections as it takes."""
    random = Random(number)
    peer, sent = None, 0
    while sent < count:
        if peer is None:
            peer = await enter(swarm, host, number)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, peer)
            try:
                while sent < count:
                    sent += await say_one(peer, host, number, random)
            except PeerFault:
                await peer.aclose()
                peer = None
            nursery.cancel_scope.cancel()
    await peer.aclose()


async def say_one(peer, host, number, random):
    session = random.randbytes(16)
    valid = conversations(identity(number), target(host), session, now(), random)
    which = random.randrange(len(valid))
    if valid[which][0] not in (DHT_PROTOCOL, INFER_PROTOCOL):
        # A link needs its session.
        protocol, messages = valid[which - 1]
        await peer.say(await peer.open(protocol), message_bytes(*messages[0]))
    protocol, data = mutated(valid[which], random)
    stream = await peer.open(protocol)
    await peer.say(stream, data, fin=random.random() < 0.3)
    await trio.sleep(random.choice([0, 0.02, 0.3]))
    if random.random() < 0.7:
        await peer.send(encode_frame(ResetFrame(stream, "cancelled")))
    return 1


@pytest.mark.parametrize("seed", range(4))
async def test_mutated_messages_of_known_peers_harm_nobody(open_swarm, whole_forward, seed):
    async with attacked(open_swarm, whole_forward) as (swarm, host), trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(attack_messages, swarm, host, 100 * seed + number, 100)


async def test_mutated_frames_of_known_peers_harm_nobody(open_swarm, whole_forward):
    async def attack(number):
        random = Random(number)
        for turn in range(40):
            # Whoever has sent ten malformed messages is let in no more.
            peer = await enter(swarm, host, number + 5 * (turn // 10))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen, peer)
                valid = conversations(identity(number), target(host), random.randbytes(16), now(), random)
                protocol, data = mutated(random.choice(valid), random)
                try:
                    stream = await peer.open(protocol)
                    await peer.say(stream, data[: random.randrange(len(data) + 1)])
                    for frame in (PingFrame(bytes(8)), CreditFrame(stream, 2**31 - 1), ResetFrame(stream, "cancelled")):
                        await peer.send(mutated_bytes(encode_frame(frame), random))
                    await trio.sleep(0.1)
                except PeerFault:
                    pass
                nursery.cancel_scope.cancel()
            await peer.aclose()

    async with attacked(open_swarm, whole_forward) as (swarm, host), trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(attack, number)


async def test_mutated_hellos_and_handshakes_harm_nobody(open_swarm, whole_forward):
    async def attack(number):
        random = Random(number)
        for _ in range(40):
            peer = HostilePeer(identity(number), await dial(swarm, host, number))
            hello = message_bytes(mutated_header(hello_message(now()), random))
            if random.random() < 0.3:
                hello = mutated_bytes(hello, random)
            with trio.move_on_after(1):
                try:
                    await peer.enter(hello)
                    await listen(peer)
                except PeerFault:
                    pass
            await peer.aclose()

    async def garble(number):
        random = Random(number)
        for _ in range(60):
            channel = await dial(swarm, host, number)
            handshake = Handshake(identity(number), initiator=True)
            try:
                first = handshake.write()
                await channel.send(mutated_bytes(first, random) if random.random() < 0.5 else first)
                handshake.read(await channel.receive())
                await channel.send(mutated_bytes(handshake.write(), random))
                await channel.send(random.randbytes(random.choice([0, 1, 100, 40_000])))
                await channel.receive()
            except PeerFault:
                pass
            await channel.aclose()

    async with attacked(open_swarm, whole_forward) as (swarm, host), trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(attack, number)
            nursery.start_soon(garble, 50 + number)


@pytest.mark.parametrize("at_once", [2, 3, 9])
async def test_handshake_messages_out_of_turn_harm_nobody(open_swarm, whole_forward, at_once):
    async with attacked(open_swarm, whole_forward) as (swarm, host):
        for number in range(3):
            channel = await dial(swarm, host, number)
            first = Handshake(identity(number), initiator=True).write()
            for _ in range(at_once):
                await channel.send(first)
            with trio.fail_after(5):
                assert isinstance(await ended(channel), PeerFault)
            await channel.aclose()
        await trio.sleep(1)


async def test_floods_of_streams_pings_credit_and_resets_harm_nobody(open_swarm, whole_forward):
    async def attack(number):
        for round_ in range(4):
            peer = await enter(swarm, host, number)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen, peer)
                try:
                    for count in range(300):
                        stream = await peer.open(INFER_PROTOCOL)
                        if round_ == 0:
                            await peer.send(encode_frame(ResetFrame(stream, "cancelled")))
                        elif round_ == 1:
                            await peer.send(encode_frame(CreditFrame(stream, 2**30)))
                        elif round_ == 2:
                            # 16 KiB of header and 4 GiB of body, says its length.
                            await peer.say(stream, b"\0\0\x40\0" + bytes(1000))
                        await peer.send(encode_frame(PingFrame(count.to_bytes(8, "big"))))
                except PeerFault:
                    pass
                await trio.sleep(1)
                nursery.cancel_scope.cancel()
            await peer.aclose()

    async with attacked(open_swarm, whole_forward) as (swarm, host), trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(attack, number)


class HostileHop:
    """Answers `open` well and all else with a valid message that has something wrong."""

    def __init__(self, random, valid):
        self.random = random
        self.valid = valid

    async def __call__(self, stream):
        opening = (await stream.receive()).header
        opened = {"type": "opened", "epoch": opening["epoch"], "max_steps": 4}
        await stream.send(opened if self.random.random() < 0.8 else mutated_header(opened, self.random))
        while True:
            step = (await stream.receive()).header
            header, body = self.random.choice(self.valid)
            header = header | {"epoch": step.get("epoch", 0), "seq": step.get("seq", 0)}
            header = mutated_header(header, self.random)
            await stream.send(header, [body if self.random.random() < 0.7 else mutated_bytes(body, self.random)])


@pytest.mark.parametrize("seed", range(2))
async def test_a_client_never_trips_over_what_a_hop_answers(open_swarm, seed):
    async with open_swarm() as swarm:
        good = await swarm.serve(BLOCKS.start, BLOCKS.end)
        bad = await swarm.serve(BLOCKS.start, BLOCKS.end)
        tensor = {"shape": [1, WIDTH], "dtype": "float32", "codec": "exact"}
        valid = [
            ({"type": "output", "rows": [[0, 2, 1]], "tensor": tensor}, bytes(4 * WIDTH)),
            ({"type": "gap", "have": [[0, 1]]}, b""),
            ({"type": "routed", "replayed": 0}, b""),
            ({"type": "step", "rows": [[0, 2, 1]], "tensor": tensor}, bytes(4 * WIDTH)),
            ({"type": "link_failed", "message": "no"}, b""),
            ({"type": "error", "code": "internal", "message": "no"}, b""),
        ]
        bad.connections.handlers[INFER_PROTOCOL] = HostileHop(Random(seed), valid)
        outcomes = Counter()
        for number in range(40):
            client = await swarm.client()
            session = await client.session(BLOCKS, max_length=64, patience=Patience(missing_s=1, busy_s=1))
            good.online = number % 2 == 0
            outcome = "silence"
            # An answer to another step, or of another epoch, is none: how long to wait is the caller's business.
            with trio.move_on_after(60):
                try:
                    await session.step(tokens(3))
                    outcome = "answer"
                except PeerdError:
                    outcome = "typed error"
            outcomes[outcome] += 1
            session.close()
        assert outcomes.total() == 40
        assert outcomes["answer"] >= 5
        assert outcomes["typed error"] >= 5


async def test_a_network_of_garbage_leaves_the_door_open(open_swarm, whole_forward):
    async def garble(number):
        random = Random(number)
        for _ in range(30):
            channel = await dial(swarm, host, number)
            with trio.move_on_after(random.choice([0.1, 20])):
                try:
                    while True:
                        await channel.send(random.randbytes(random.choice([0, 1, 32, 96, 5000])))
                        await channel.receive()
                except PeerFault:
                    pass
            await channel.aclose()

    async with attacked(open_swarm, whole_forward) as (swarm, host), trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(garble, number)
        nursery.start_soon(swarm.client)


def test_the_hostile_say_the_same_again_with_the_same_seed():
    here = Target(identity(1).peer_id, MODEL, BLOCKS, WIDTH)
    said = [
        [mutated(one, random) for one in conversations(identity(2), here, b"s" * 16, EPOCH, random)]
        for random in (Random(5), Random(5))
    ]
    assert said[0] == said[1]
