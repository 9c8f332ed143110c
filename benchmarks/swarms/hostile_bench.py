"""Attacks a server: does it survive, does its memory stay, and does an honest client keep its speed?

`make bench-hostile` starts a real server of the demonstration's model on loopback, decodes on it without pause, and
after a while attacks it from another process. Half of the attacks come from strangers: garbage on TCP, half-finished
handshakes, garbage in websockets and in Noise, and connections that send hardly anything. The other half come from
peers that prove their key and then send mutated valid messages in every protocol, and floods.

Server, client and attackers share this machine's cores. An attack that fills a core slows every process on it, however
well the server resists; so `--rate` limits each half. The valid steps of an attack's conversation are work that any
client may request. Compare figures within a run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
import trio
from rich.console import Console
from rich.table import Table

from peerd.cli.processes import PeerProcess, open_peer_processes
from peerd.client.model import SwarmModel
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.net.transport import MessageChannel
from peerd.net.websockets.transport import WebSocketTransport
from peerd.peer import open_peer
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.frames import CreditFrame, Frame, PingFrame, ResetFrame, encode_frame
from peerd.protocol.connection.noise import Handshake
from peerd.protocol.errors import PeerFault
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.messages.session import INFER_PROTOCOL
from peerd.protocol.span import Span
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

# The pool is filled once before the measurement, so that memory that the server reserved at its start is not growth.
KV_TOKENS = 2048
SESSION_LENGTH = 384
PROMPT_TOKENS = 32
QUIET_S = 15.0
# Sessions linger for 15 s after their connections break, unproven connections for 10 s.
SETTLE_S = 20.0
# The longest that one attack may take.
ATTACK_S = 8.0
MAX_AT_ONCE = 48
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Protocol: peerd.1\r\n\r\n"
)


# The attackers' process.


@dataclass
class Attackers:
    """Attacks one peer, and counts the attacks by kind."""

    address: Multiaddr
    target: Target
    random: Random
    sent: Counter[str] = field(default_factory=Counter)

    async def run(self, seconds: float, rate: float) -> None:
        """Attack for `seconds`, as strangers and as known peers, each `rate` times a second."""
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_at_it, nursery, rate, self._strangers())
                nursery.start_soon(self._keep_at_it, nursery, rate, self._known())

    def _strangers(self) -> dict[str, Callable[[], Awaitable[None]]]:
        return {
            "garbage on TCP": self.tcp_garbage,
            "half websocket handshakes": self.half_upgrade,
            "garbage in websockets": self.websocket_garbage,
            "garbage in Noise": self.noise_garbage,
            "slow connections": self.slow,
        }

    def _known(self) -> dict[str, Callable[[], Awaitable[None]]]:
        return {
            "mutated conversations": self.mutated_conversations,
            "mutated frames": self.mutated_frames,
            "mutated hellos": self.mutated_hello,
            "floods of opens and resets": self.flood_opens,
            "floods of pings and credit": self.flood_pings,
            "huge claims": self.claims,
        }

    async def _keep_at_it(
        self, nursery: trio.Nursery, rate: float, kinds: dict[str, Callable[[], Awaitable[None]]]
    ) -> None:
        limit = trio.CapacityLimiter(MAX_AT_ONCE)
        next_at = trio.current_time()
        while True:
            name = self.random.choice(list(kinds))
            nursery.start_soon(self._attack, limit, name, kinds[name])
            next_at += 1 / rate
            await trio.sleep_until(next_at)

    async def _attack(self, limit: trio.CapacityLimiter, name: str, attack: Callable[[], Awaitable[None]]) -> None:
        async with limit:
            with trio.move_on_after(ATTACK_S):
                try:
                    await attack()
                except* (OSError, trio.BrokenResourceError, PeerFault):
                    # The server ended the connection, as it should.
                    pass
            self.sent[name] += 1

    async def tcp_garbage(self) -> None:
        async with await trio.open_tcp_stream(self.address.host, self.address.port) as stream:
            for _ in range(self.random.randrange(1, 5)):
                await stream.send_all(self.random.randbytes(self.random.choice([1, 100, 4000])))
            await stream.receive_some(100)

    async def half_upgrade(self) -> None:
        request = mutated_bytes(UPGRADE, self.random) if self.random.random() < 0.7 else UPGRADE
        async with await trio.open_tcp_stream(self.address.host, self.address.port) as stream:
            await stream.send_all(request[: self.random.randrange(1, len(request) + 1)])
            with trio.move_on_after(self.random.choice([0.01, 3])):
                await stream.receive_some(1000)

    async def websocket_garbage(self) -> None:
        async with await trio.open_tcp_stream(self.address.host, self.address.port) as stream:
            await stream.send_all(UPGRADE)
            await stream.receive_some(1000)
            head = self.random.choice([b"\x82\xfe\xff\xff", b"\x82\xff" + b"\x7f" * 8, b"\x89\xff", b"\x81\x85", b""])
            await stream.send_all(head + self.random.randbytes(self.random.choice([4, 200, 40_000])))
            await stream.receive_some(1000)

    async def noise_garbage(self) -> None:
        handshake = Handshake(Identity.generate(), initiator=True)
        first = handshake.write()
        async with self._dialled() as channel:
            if self.random.random() < 0.5:
                await channel.send(mutated_bytes(first, self.random))
            else:
                await channel.send(first)
                handshake.read(await channel.receive())
                await channel.send(mutated_bytes(handshake.write(), self.random))
            await channel.send(self.random.randbytes(self.random.choice([1, 96, 30_000])))
            await channel.receive()

    async def slow(self) -> None:
        async with await trio.open_tcp_stream(self.address.host, self.address.port) as stream:
            for byte in UPGRADE:
                await stream.send_all(bytes([byte]))
                await trio.sleep(0.5)

    async def mutated_conversations(self) -> None:
        """Hold up to five conversations on one connection, each with one thing wrong."""
        identity = Identity.generate()
        for_now = conversations(identity, self.target, self.random.randbytes(16), time.time(), self.random)

        async def attack(peer: HostilePeer) -> None:
            for _ in range(5):
                which = self.random.randrange(len(for_now))
                if which == len(for_now) - 1:
                    # A link refers to its session, so open that first.
                    protocol, messages = for_now[which - 1]
                    await peer.say(await peer.open(protocol), message_bytes(*messages[0]))
                protocol, data = mutated(for_now[which], self.random)
                stream = await peer.open(protocol)
                await peer.say(stream, data, fin=self.random.random() < 0.3)
                await trio.sleep(self.random.choice([0.0, 0.05, 0.5]))
                if self.random.random() < 0.7:
                    await peer.send(encode_frame(ResetFrame(stream, "cancelled")))

        await self._as_peer(identity, attack)

    async def mutated_frames(self) -> None:
        async def attack(peer: HostilePeer) -> None:
            stream = await peer.open(INFER_PROTOCOL)
            frames: list[Frame] = [PingFrame(bytes(8)), CreditFrame(stream, 2**31 - 1), ResetFrame(stream, "cancelled")]
            while True:
                await peer.send(mutated_bytes(encode_frame(self.random.choice(frames)), self.random))
                await trio.sleep(0.02)

        await self._as_peer(Identity.generate(), attack)

    async def mutated_hello(self) -> None:
        hello = message_bytes(mutated_header(hello_message(time.time()), self.random))
        await self._as_peer(Identity.generate(), _stay, mutated_bytes(hello, self.random))

    async def flood_opens(self) -> None:
        async def attack(peer: HostilePeer) -> None:
            resets = self.random.random() < 0.5
            for _ in range(400):
                stream = await peer.open(self.random.choice([INFER_PROTOCOL, "/peerd/dht/1", "/nobody/9"]))
                if resets:
                    await peer.send(encode_frame(ResetFrame(stream, "cancelled")))

        await self._as_peer(Identity.generate(), attack)

    async def flood_pings(self) -> None:
        async def attack(peer: HostilePeer) -> None:
            stream = await peer.open(INFER_PROTOCOL)
            for count in range(500):
                await peer.send(encode_frame(PingFrame(count.to_bytes(8, "big"))))
                await peer.send(encode_frame(CreditFrame(stream, 1 + count)))

        await self._as_peer(Identity.generate(), attack)

    async def claims(self) -> None:
        """Announce a header of 16 KiB and a body of 4 GiB without sending them, and ask for a session too large for any
        server.
        """
        vast = {"max_length": 2**24, "max_rows": 256, "max_steps": 64, "timeout_ms": 600_000}
        identity = Identity.generate()
        protocol, messages = conversations(identity, self.target, bytes(16), time.time(), self.random)[-2]

        async def attack(peer: HostilePeer) -> None:
            for _ in range(20):
                await peer.say(await peer.open(protocol), b"\0\0\x40\0" + bytes(9000))
            await peer.say(await peer.open(protocol), message_bytes(messages[0][0] | vast))
            stream = await peer.open(protocol)
            opening, body = messages[0]
            await peer.say(stream, message_bytes(opening, body))
            step = message_bytes(messages[1][0])[:-4]
            await peer.say(stream, step + b"\xff\xff\xff\xff" + bytes(10_000))
            await trio.sleep(1)

        await self._as_peer(identity, attack)

    async def _as_peer(
        self, identity: Identity, attack: Callable[[HostilePeer], Awaitable[None]], hello: bytes | None = None
    ) -> None:
        """Attack over a connection that the server accepts, in most cases reading what it sends."""
        async with self._dialled() as channel:
            peer = HostilePeer(identity, channel)
            await peer.enter(message_bytes(hello_message(time.time())) if hello is None else hello)
            async with trio.open_nursery() as nursery:
                if self.random.random() < 0.8:
                    nursery.start_soon(_listen, peer)
                with suppress(PeerFault):
                    await attack(peer)
                nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def _dialled(self) -> AsyncIterator[MessageChannel]:
        async with trio.open_nursery() as tasks:
            channel = await WebSocketTransport().dial(self.address, tasks)
            try:
                yield channel
            finally:
                await channel.aclose()
                tasks.cancel_scope.cancel()


async def _stay(peer: HostilePeer) -> None:
    await trio.sleep(1)


async def _listen(peer: HostilePeer) -> None:
    with suppress(PeerFault):
        while True:
            await peer.hear()


def attack(arguments: argparse.Namespace) -> None:
    """The attackers' process: attack, then print how many attacks of each kind were made."""
    address = Multiaddr.parse(arguments.attack)
    assert address.peer_id is not None
    start, end = map(int, arguments.blocks.split(":"))
    target = Target(PeerId(address.peer_id), bytes.fromhex(arguments.digest), Span(start, end), arguments.width)
    attackers = Attackers(address.with_peer(None), target, Random(arguments.seed))
    trio.run(attackers.run, arguments.seconds, arguments.rate)
    print(json.dumps(attackers.sent))


# The honest client's process.


@dataclass
class Decoder:
    """Decodes on one session without pause, and notes when each token came."""

    model: SwarmModel
    times: list[float] = field(default_factory=list)

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        async with self.model.session(max_length=SESSION_LENGTH, max_rollback=SESSION_LENGTH) as session:
            await session.step(self.model.embed(list(range(100, 100 + PROMPT_TOKENS))))
            task_status.started()
            token, position = 100, PROMPT_TOKENS
            while True:
                # Start over where the session is full: the next position is then a rollback.
                position = PROMPT_TOKENS if position == SESSION_LENGTH else position
                hidden = await session.step(self.model.embed([token], position), start=position)
                token = int((await self.model.logits(hidden))[-1].argmax())
                position += 1
                self.times.append(trio.current_time())

    def rate(self, since: float, until: float) -> float:
        """The median of the numbers of tokens in each whole second."""
        seconds = [0] * int(until - since)
        for at in self.times:
            if since <= at < since + len(seconds):
                seconds[int(at - since)] += 1
        return statistics.median(seconds)


def rss_mib(pid: int) -> float:
    """The process's resident memory; 0 if it has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


async def fill_pool(model: SwarmModel) -> None:
    """Use all of the server's KV memory once."""
    length = KV_TOKENS
    async with model.session(max_length=length) as session:
        await session.step(model.embed([100] * length))


async def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    path = demo_model_path()
    with open_checkpoint(path) as checkpoint:
        span = Span(0, checkpoint.block_count)
    async with open_peer_processes(threads=1) as processes:
        server = await processes.start("--serve-blocks", str(span), "--model", str(path), "--kv-tokens", str(KV_TOKENS))
        async with open_peer(bootstrap=[server.address]) as peer, peer.model(path) as model:
            console.log("filling the server's KV memory")
            await fill_pool(model)
            decoder = Decoder(model)
            async with trio.open_nursery() as nursery:
                await nursery.start(decoder.run)
                figures = await phases(arguments, server, model, decoder, console)
                nursery.cancel_scope.cancel()
    return figures


async def phases(
    arguments: argparse.Namespace, server: PeerProcess, model: SwarmModel, decoder: Decoder, console: Console
) -> dict[str, Any]:
    """Measure a quiet phase, an attack, and a quiet phase again."""
    pid = server.process.pid
    await trio.sleep(2)
    console.log("quiet")
    began, before_mib = trio.current_time(), rss_mib(pid)
    await trio.sleep(QUIET_S)
    attacked_at = trio.current_time()
    console.log(f"{arguments.seconds:g} s of attacks")
    sent = await attack_from_outside(arguments, server, model)
    ended_at, attacked_mib = trio.current_time(), rss_mib(pid)
    console.log("quiet again")
    await trio.sleep(SETTLE_S)
    if server.process.poll() is not None:
        console.print(server.log.read_text(errors="replace")[-4000:], markup=False)
    return {
        "sent": sent,
        "alive": server.process.poll() is None,
        "rss": (before_mib, attacked_mib, rss_mib(pid)),
        "rates": (
            decoder.rate(began, attacked_at),
            # In its first second or two the attackers' process only starts.
            decoder.rate(ended_at - arguments.seconds, ended_at),
            decoder.rate(trio.current_time() - SETTLE_S, trio.current_time()),
        ),
    }


async def attack_from_outside(arguments: argparse.Namespace, server: PeerProcess, model: SwarmModel) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.swarms.hostile_bench", "--attack", str(server.address)]
    command += ["--digest", model.facts.digest.hex()]
    command += ["--blocks", f"0:{model.facts.block_count}", "--width", str(model.facts.width)]
    command += ["--seconds", str(arguments.seconds), "--rate", str(arguments.rate), "--seed", str(arguments.seed)]
    ended = await trio.run_process(command, capture_stdout=True)
    sent: dict[str, int] = json.loads(ended.stdout)
    return sent


def show(figures: dict[str, Any], arguments: argparse.Namespace, console: Console) -> None:
    table = Table(
        "",
        "before",
        "attacked",
        "after",
        title=f"{arguments.seconds:g} s of hostile peers: {arguments.rate:g} attacks a second from strangers, as many"
        " from known peers; SmolLM2-135M-Instruct, fp32, one thread a process, loopback",
    )
    table.add_row("server's memory, MiB", *(f"{mib:.0f}" for mib in figures["rss"]))
    table.add_row("honest client, tokens/s (median)", *(f"{rate:.1f}" for rate in figures["rates"]))
    before, attacked, after = figures["rates"]
    table.add_row("of its speed before", "1", f"{attacked / before:.2f}", f"{after / before:.2f}")
    for kind, count in figures["sent"].items():
        table.add_row(kind, "", str(count), "")
    table.add_row("attacks sent", "", str(sum(figures["sent"].values())), "")
    table.add_row("server alive", "yes", "", "yes" if figures["alive"] else "NO")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rate", type=float, default=5, help="attacks a second, of each half")
    parser.add_argument("--seed", type=int, default=1)
    for internal in ("--attack", "--digest", "--blocks"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.attack:
        attack(arguments)
        return
    console = Console(width=120)
    figures = trio.run(measure, arguments, console)
    show(figures, arguments, console)
    if not figures["alive"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
