"""A stateful fuzzer over TCP against a real peer: `python -m tests.fuzz.attack --seconds 300`.

Each attack goes as far as it says before it breaks a rule: the HTTP upgrade, websocket frames, the handshake, frames
of an authenticated connection, questions in every protocol, and *answers* to what the peer asks us, for it takes us for
a peer of its DHT. All choices come from one seed. Afterwards the peer must be alive, must never have computed for a
second without looking at anything else, must not have grown by 64 MiB, must have its descriptors back, and must have
served an honest client exactly all the while.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random

import torch
import trio
import trio.lowlevel

from peerd.exchange.step_tensors import encoded
from peerd.net.connections import Stream, open_connections
from peerd.net.transport import MessageChannel
from peerd.net.websockets.transport import WebSocketTransport
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.frames import (
    CreditFrame,
    GoAwayFrame,
    OpenFrame,
    PingFrame,
    PongFrame,
    Priority,
    ResetFrame,
    encode_data,
    encode_frame,
)
from peerd.protocol.connection.hello import HELLO_PROTOCOL
from peerd.protocol.connection.noise import Handshake
from peerd.protocol.encoding.tensors import TensorHeader, decode_tensor
from peerd.protocol.errors import PeerdError
from peerd.protocol.identity import Identity
from peerd.protocol.messages.adapters import ADAPTER_PROTOCOL
from peerd.protocol.messages.dialback import DIALBACK_PROTOCOL
from peerd.protocol.messages.relay import CIRCUIT_PROTOCOL, RELAY_PROTOCOL
from peerd.protocol.messages.session import INFER_PROTOCOL, PROGRESS_PROTOCOL, OpenSession, Output, Step
from peerd.protocol.messages.training import PASS_PROTOCOL
from peerd.protocol.rows import RowSlice
from peerd.routing.dht.messages import DHT_PROTOCOL
from peerd.testing.fake_engine import fake_forward
from peerd.testing.hostile import (
    Conversation,
    HostilePeer,
    Target,
    conversations,
    hello_message,
    message_bytes,
    mutated,
    mutated_bytes,
    mutated_header,
)
from tests.fuzz.victim import BLOCKS, MODEL, WIDTH

ROOT = Path(__file__).parents[2]
MAX_LOOP_S = 1.0
MAX_GROWTH_BYTES = 64 * 2**20
# One attack, and how many go on at a time.
ATTACK_S = 3.0
AT_ONCE = 6
# Connections that nobody uses any more are closed in less than this.
QUIET_S = 20.0
# What the event loop, logs and the connections of the moment may have more than before.
SPARE_DESCRIPTORS = 3

# How the peer's refusals look from here.
_REFUSED = (OSError, PeerdError, trio.BrokenResourceError, trio.ClosedResourceError, trio.EndOfChannel)
_UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Protocol: peerd.1\r\n\r\n"
)
# What an honest peer begins with in the protocols that `conversations` leaves out.
_OTHER_QUESTIONS: tuple[tuple[str, dict[str, object]], ...] = (
    (RELAY_PROTOCOL, {"type": "reserve"}),
    (RELAY_PROTOCOL, {"type": "connect", "peer": Identity.from_seed(bytes(32)).peer_id}),
    (CIRCUIT_PROTOCOL, {"type": "incoming", "peer": Identity.from_seed(bytes(32)).peer_id}),
    (DIALBACK_PROTOCOL, {"type": "dial_me", "ports": [1]}),
    (PASS_PROTOCOL, {"type": "begin", "model": MODEL, "start": 0, "end": 4}),
    (ADAPTER_PROTOCOL, {"type": "upload", "session": bytes(16), "hop": 0, "pairs": 1, "values": 10}),
    (PROGRESS_PROTOCOL, {"type": "ask", "session": bytes(16), "hop": 0}),
)
# What the peer may be answered, right or wrong for what it asked.
_ANSWERS: tuple[dict[str, object], ...] = (
    {"type": "pong"},
    {"type": "found"},
    {"type": "found", "nodes": [[Identity.from_seed(bytes(32)).peer_id, ["/ip4/127.0.0.1/tcp/1/ws"]]]},
    {"type": "stored", "outcomes": ["stored"]},
    {"type": "dialled", "ip": "127.0.0.1", "results": [[1, "ok"]]},
    *(
        {"type": "error", "code": code, "message": "x"}
        for code in ("internal", "no_chain", "local_protocol", "overloaded")
    ),
)


class Victim:
    """The peer under attack."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self.address = Multiaddr.parse(process.stdout.readline().strip())

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    @property
    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def slowest_turn_s(self) -> float:
        """The longest that its loop has computed since it was asked last. Raises AssertionError where it has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        said = self.process.stdout.readline()
        assert said, "the peer has ended: see its log"
        return float(said)


@contextlib.contextmanager
def open_victim(log: Path):
    """Start the peer, and end it with the block."""
    environment = os.environ | {"PEERD_STRICT": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.victim"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
        )
    try:
        yield Victim(process)
    finally:
        process.kill()
        process.communicate()


class Attacker:
    """Attacks one peer. `done` counts what was tried, and how often the peer asked us something."""

    def __init__(self, victim: Victim, random: Random) -> None:
        self.done: Counter[str] = Counter()
        self._victim = victim
        self._random = random
        self._target = Target(victim.address.peer_id, MODEL, BLOCKS, WIDTH)  # type: ignore[arg-type]
        kinds: tuple[Callable[[Random], Awaitable[None]], ...] = (
            self.break_upgrade,
            self.break_websocket,
            self.break_handshake,
            self.break_frames,
            self.break_questions,
            self.break_questions,
            self.break_answers,
            self.break_answers,
        )
        # In turn, so that a short run tries each.
        self._turns = itertools.cycle(kinds)

    async def run(self, seconds: float) -> None:
        """Attack until the time is over."""
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                for _ in range(AT_ONCE):
                    nursery.start_soon(self._attack_for_ever)

    async def _attack_for_ever(self) -> None:
        while True:
            random = Random(self._random.getrandbits(64))
            kind = next(self._turns)
            self.done[kind.__name__] += 1
            with trio.move_on_after(ATTACK_S):
                try:
                    await kind(random)
                except* _REFUSED:
                    pass
            await trio.lowlevel.checkpoint()

    async def break_upgrade(self, random: Random) -> None:
        """HTTP that is none, or another."""
        async with await self._connect() as stream:
            request = _UPGRADE
            for _ in range(random.choice([1, 1, 3])):
                request = mutated_bytes(request, random)
            await stream.send_all(random.choice([request, request[:20], random.randbytes(200), _UPGRADE + request]))
            await self._linger(stream, random)

    async def break_websocket(self, random: Random) -> None:
        """A proper upgrade, then any frames, also while the peer closes."""
        async with await self._connect() as stream:
            await stream.send_all(_UPGRADE)
            await stream.receive_some(4096)
            if random.random() < 0.5:
                # No handshake: the peer closes, and waits half a second for us to do so too.
                await stream.send_all(b"\x82\x84" + bytes(4) + b"junk")
                await trio.sleep(random.choice([0, 0.05, 0.1, 0.3]))
                await stream.send_all(random.choice([b"\x89\x80", b"\x8a\x80", b"\x88\x80"]) + bytes(4))
            for _ in range(random.randrange(1, 8)):
                await stream.send_all(_websocket_frame(random))
                await trio.sleep(random.choice([0, 0, 0.05]))
            await self._linger(stream, random)

    async def break_handshake(self, random: Random) -> None:
        """Noise messages that were changed, come out of turn, or not at all."""
        async with self._channel() as channel:
            handshake = Handshake(Identity.from_seed(random.randbytes(32)), initiator=True)
            at = random.randrange(3)
            first = handshake.write()
            await channel.send(mutated_bytes(first, random) if at == 0 else first)
            handshake.read(await channel.receive())
            last = handshake.write()
            await channel.send(mutated_bytes(last, random) if at == 1 else last)
            for _ in range(3):
                await channel.send(random.randbytes(random.choice([0, 1, 16, 200])))
            await channel.receive()

    async def break_frames(self, random: Random) -> None:
        """An authenticated connection, and frames of every kind with any numbers."""
        async with self._entered(random) as peer:
            for _ in range(random.randrange(1, 30)):
                frame = _frame(random)
                await peer.send(mutated_bytes(frame, random) if random.random() < 0.5 else frame)
            await _hear(peer)

    async def break_questions(self, random: Random) -> None:
        """A conversation in one protocol with one error; sometimes two at once."""
        async with self._entered(random) as peer, trio.open_nursery() as nursery:
            nursery.start_soon(_hear, peer)
            for _ in range(random.choice([1, 2, 4])):
                protocol, data = self._question(random)
                stream = await peer.open(protocol)
                at = random.randrange(len(data) + 1)
                await peer.say(stream, data[:at])
                await trio.sleep(random.choice([0, 0, 0.05]))
                await peer.say(stream, data[at:], fin=random.random() < 0.5)
                if random.random() < 0.3:
                    await peer.send(encode_frame(ResetFrame(stream, "cancelled")))
            await trio.sleep(random.choice([0, 0.2, 1]))
            nursery.cancel_scope.cancel()

    def _question(self, random: Random) -> tuple[str, bytes]:
        known: list[Conversation] = conversations(
            Identity.from_seed(random.randbytes(32)), self._target, random.randbytes(16), time.time(), random
        )
        known += [(protocol, ((dict(header), b""),)) for protocol, header in _OTHER_QUESTIONS]
        return mutated(random.choice(known), random)

    async def break_answers(self, random: Random) -> None:
        """We are a peer of its DHT, at an address of our own: it dials us, asks us, and we answer anything."""
        identity = Identity.from_seed(random.randbytes(32))
        async with trio.open_nursery() as nursery:
            listen = WebSocketTransport().listen
            be_dialled = partial(self._be_dialled, identity, random)
            here: Multiaddr = await nursery.start(listen, Multiaddr("ip4", "127.0.0.1", 0), be_dialled)
            async with self._entered(random, identity) as peer:
                stream = await peer.open(DHT_PROTOCOL)
                kind = random.choice(["ping", "find_node"])
                question = {"type": kind, "key": random.randbytes(20), "addresses": [str(here)]}
                await peer.say(stream, message_bytes(question), fin=True)
                await self._answer_all(peer, random)

    async def _be_dialled(self, identity: Identity, random: Random, channel: MessageChannel) -> None:
        """It dials the address that we gave it."""
        self.done["dials of us"] += 1
        with suppress(PeerdError):
            request = await channel.receive()
            if random.random() < 0.3:
                await channel.send(mutated_bytes(request, random))
                return
            peer = HostilePeer(identity, channel)
            await peer.be_entered(request, message_bytes(hello_message(time.time())))
            await self._answer_all(peer, random)

    async def _answer_all(self, peer: HostilePeer, random: Random) -> None:
        while True:
            frame = await peer.hear()
            if isinstance(frame, OpenFrame) and frame.protocol != HELLO_PROTOCOL:
                self.done["questions to us"] += 1
                answer = message_bytes(mutated_header(dict(random.choice(_ANSWERS)), random))
                answer = mutated_bytes(answer, random) if random.random() < 0.3 else answer
                await peer.say(frame.stream, answer, fin=random.random() < 0.7)

    async def _connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self._victim.address.port)

    @staticmethod
    async def _linger(stream: trio.SocketStream, random: Random) -> None:
        with trio.move_on_after(random.choice([0, 0.1, 1])):
            while await stream.receive_some(65536):
                pass

    @asynccontextmanager
    async def _channel(self) -> AsyncIterator:
        async with trio.open_nursery() as nursery:
            channel = await WebSocketTransport().dial(self._victim.address.with_peer(None), nursery)
            try:
                yield channel
            finally:
                channel.abort()

    @asynccontextmanager
    async def _entered(self, random: Random, identity: Identity | None = None) -> AsyncIterator[HostilePeer]:
        async with self._channel() as channel:
            peer = HostilePeer(identity or Identity.from_seed(random.randbytes(32)), channel)
            hello = hello_message(time.time())
            await peer.enter(message_bytes(mutated_header(hello, random) if random.random() < 0.1 else hello))
            yield peer


async def _hear(peer: HostilePeer) -> None:
    with suppress(PeerdError):
        while True:
            await peer.hear()


def _websocket_frame(random: Random) -> bytes:
    code = random.choice([0x0, 0x1, 0x2, 0x8, 0x9, 0xA, random.randrange(16)])
    payload = random.randbytes(random.choice([0, 1, 2, 32, 125, 126, 70_000]))
    if code == 0x8 and random.random() < 0.5:
        payload = (1000).to_bytes(2, "big")
    head = bytes([(0x80 if random.random() < 0.8 else 0) | code])
    if len(payload) < 126:
        head += bytes([0x80 | len(payload)])
    else:
        head += bytes([0x80 | 127]) + len(payload).to_bytes(8, "big")
    frame = head + bytes(4) + payload
    return mutated_bytes(frame, random) if random.random() < 0.2 else frame


def _frame(random: Random) -> bytes:
    stream = random.choice([0, 1, 2, 3, 5, 7, 101, 2**31, 2**32 - 1])
    protocol = random.choice([DHT_PROTOCOL, INFER_PROTOCOL, RELAY_PROTOCOL, "/nothing/1"])
    match random.randrange(7):
        case 0:
            return encode_frame(
                OpenFrame(stream, protocol, random.choice(list(Priority)), random.choice([0, 1, 2**20]))
            )
        case 1:
            return encode_data(stream, [random.randbytes(random.choice([1, 100, 30_000]))], fin=random.random() < 0.3)
        case 2:
            return encode_frame(CreditFrame(stream, random.choice([1, 65536, 2**31])))
        case 3:
            return encode_frame(ResetFrame(stream, "cancelled"))
        case 4:
            return encode_frame(PingFrame(random.randbytes(8)))
        case 5:
            return encode_frame(PongFrame(random.randbytes(8)))
        case _:
            return encode_frame(GoAwayFrame("bye", "a reason\n\x1b[31m"))


class Honest:
    """A client that keeps the rules, and gets what it should."""

    def __init__(self, victim: Victim) -> None:
        self.steps = 0
        self._victim = victim

    async def run(self) -> None:
        """Sessions of a few steps, until cancelled. Raises AssertionError for a wrong result, PeerdError for none."""
        identity = Identity.generate()
        async with open_connections(identity, transport=WebSocketTransport(), handlers={}) as connections:
            while True:
                peer_id = self._victim.address.peer_id
                assert peer_id is not None
                stream = await connections.open_stream(peer_id, INFER_PROTOCOL, addresses=[self._victim.address])
                async with stream:
                    with trio.fail_after(60):
                        await self._session(stream)
                await trio.sleep(0.2)

    async def _session(self, stream: Stream) -> None:
        await stream.send(
            OpenSession(
                session=os.urandom(16),
                hop=0,
                epoch=0,
                model=MODEL,
                start=BLOCKS.start,
                end=BLOCKS.end,
                max_length=32,
                timeout_ms=30_000,
            ).to_header()
        )
        opened = await stream.receive()
        assert opened.header["type"] == "opened", opened.header
        row = torch.randint(0, 251, (8, WIDTH)).float()
        expected = fake_forward(row, BLOCKS)
        for seq, (start, count) in enumerate([(0, 4), (4, 1), (5, 3)], 1):
            step = Step(epoch=0, seq=seq, rows=(RowSlice(0, start, count),), want="all")
            await stream.send(*encoded(step, row[start : start + count], "exact", torch.float32))
            answer = await stream.receive(2**20)
            output = Output.from_header(answer.header)
            assert output.tensor is not None
            header = TensorHeader.from_fields(output.tensor, max_elements=2**16)
            assert torch.equal(decode_tensor(header, answer.body), expected[start : start + count])
            self.steps += 1


async def attack(victim: Victim, seconds: float, random: Random) -> tuple[Counter[str], int]:
    """Attack the peer for so long, and check it. Returns what was tried, and how many steps the honest client had.

    Raises AssertionError, saying what is wrong.
    """
    attacker, honest = Attacker(victim, random), Honest(victim)
    # What is loaded and cached with the first attacks stays.
    await attacker.run(min(seconds / 4, 10))
    assert victim.is_alive, "the peer has ended: see its log"
    await _wait_quiet(victim, 0)
    descriptors, resident = victim.descriptors, victim.resident_bytes
    victim.slowest_turn_s()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(honest.run)
        await attacker.run(seconds)
        nursery.cancel_scope.cancel()
    slowest_s = victim.slowest_turn_s()
    assert slowest_s < MAX_LOOP_S, f"its loop computed for {slowest_s:.2f} s at a time"
    await _wait_quiet(victim, descriptors + SPARE_DESCRIPTORS)
    left = victim.descriptors
    assert left <= descriptors + SPARE_DESCRIPTORS, f"{left} descriptors are open, {descriptors} were before"
    grown = victim.resident_bytes - resident
    assert grown < MAX_GROWTH_BYTES, f"it has grown by {grown / 2**20:.0f} MiB"
    assert honest.steps > 0, "the honest client was not served"
    return attacker.done, honest.steps


async def _wait_quiet(victim: Victim, descriptors: int) -> None:
    """Wait until it has so few descriptors, or for as long as what nobody uses may stay."""
    with trio.move_on_after(QUIET_S if descriptors else 1.0):
        while victim.is_alive and victim.descriptors > descriptors:
            await trio.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    asked = parser.parse_args()
    log = Path(f"fuzz-{asked.seed}.log")
    print(f"seed {asked.seed}; the peer's log is {log}", flush=True)
    with open_victim(log) as victim:
        done, steps = trio.run(attack, victim, asked.seconds, Random(asked.seed))
    for name, count in sorted(done.items()):
        print(f"{name.replace('_', ' ')}: {count}")
    print(f"the honest client: {steps} steps, all exact")
    log.unlink()


if __name__ == "__main__":
    main()
