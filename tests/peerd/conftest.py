"""A swarm in memory: servers with a fake engine, clients, and deaths at the test's command."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import torch
import trio

from peerd.client.finding.finder import Patience
from peerd.client.session.mender import SessionSpec, SessionTools
from peerd.client.session.opener import ChainOpener, Terms
from peerd.client.session.session import Session
from peerd.compute.adapters.lora import Lora
from peerd.compute.engine.engine import BaseEngine
from peerd.net.connections import Connections, Stream, open_connections
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.schema import Message, parse
from peerd.protocol.errors import PeerdError
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.messages.session import (
    CONTROL_FROM_HOP,
    INFER_PROTOCOL,
    LINK_FROM_DOWNSTREAM,
    Failure,
    NextHop,
    Opened,
    OpenSession,
)
from peerd.protocol.messages.tickets import Ticket, sign_ticket
from peerd.protocol.records.envelope import PeerRecord, ServerRecord, SignedRecord, sign_record
from peerd.protocol.rows import SessionSize
from peerd.protocol.span import Span
from peerd.routing.chains.adapter_choice import NO_ADAPTER, AdapterNeed, choose_adapter
from peerd.routing.chains.chain import Between, Chain, ChainNeeds, plan_chain
from peerd.routing.directory.offer import Offer
from peerd.routing.failures.receipts import ReceiptBook
from peerd.routing.failures.track_record import TrackRecord
from peerd.server.engine_task import EngineTask
from peerd.server.quotas import AdapterRoom
from peerd.server.served_head import ServedHead
from peerd.server.served_spans import ServedSpan
from peerd.server.server import Server
from peerd.testing.fake_engine import FakeEngine, fake_forward
from peerd.testing.network import MemoryNetwork
from peerd.trio_tools import open_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EPOCH = 1_800_000_000.0
MODEL = bytes(range(32))
WIDTH = 8
MAX_LENGTH = 1024


def unix_now() -> float:
    return EPOCH + trio.current_time()


@dataclass(eq=False)
class Host:
    """One serving peer."""

    ip: str
    identity: Identity
    span: Span
    server: Server
    task: EngineTask
    connections: Connections
    receipts: ReceiptBook
    online: bool = True
    dtype: str = "float32"
    quantization: str = "none"

    @property
    def peer_id(self) -> PeerId:
        return self.identity.peer_id

    def offer(self) -> Offer:
        peer = PeerRecord(
            seq=1, expires=unix_now() + 60, addresses=tuple(str(a) for a in self.connections.listen_addresses)
        )
        server = ServerRecord(
            seq=1,
            expires=unix_now() + 60,
            model=MODEL,
            span=self.span,
            state="online",
            dtype=self.dtype,
            quantization=self.quantization,
            codecs=("exact",),
            throughput=1000.0,
            free_tokens=self.task.engine.free_length,
            max_length=MAX_LENGTH,
            adapters=tuple(sorted(self.task.adapters)),
            client_adapters=self.server.spans[0].adapter_room.session_bytes,
            head=self.server.spans[0].head is not None,
        )
        addresses = tuple(address.with_peer(self.peer_id) for address in self.connections.listen_addresses)
        return Offer(self.peer_id, server, addresses, sign_record(self.identity, peer))


@dataclass
class Finder:
    """Plans over the peers that are announced now, as the swarm's own finder does with the DHT."""

    swarm: Swarm
    track_record: TrackRecord = field(default_factory=lambda: TrackRecord(trio.current_time))
    random: Random = field(default_factory=lambda: Random(1))
    failures: list[PeerId] = field(default_factory=list)

    async def find(
        self,
        blocks: Span,
        *,
        tokens: int,
        exclude: Collection[PeerId],
        positions: int = 1,
        adapter: AdapterNeed = NO_ADAPTER,
        requests: int = 0,
        between: Between | None = None,
    ) -> Chain:
        await trio.lowlevel.checkpoint()
        needs = ChainNeeds(
            tokens=tokens,
            positions=positions,
            adapter=adapter,
            requests=requests,
            after=between[0] if between else None,
            before=between[1] if between else None,
        )
        return self.plan(blocks, needs, exclude)

    def plan(self, blocks: Span, needs: ChainNeeds, exclude: Collection[PeerId]) -> Chain:
        avoid = self.track_record.avoided() | frozenset(exclude)
        return plan_chain(self._offers(), blocks, needs=needs, random=self.random, avoid=avoid)

    async def adapter_id(self, name: str, blocks: Span) -> str:
        await trio.lowlevel.checkpoint()
        return choose_adapter(self._offers(), name, blocks)

    def _offers(self) -> list[Offer]:
        return [host.offer() for host in self.swarm.hosts if host.online]

    async def offers(self, max_age_s: float) -> list[Offer]:
        await trio.lowlevel.checkpoint()
        return self._offers()

    def avoided(self) -> frozenset[PeerId]:
        return self.track_record.avoided()

    def failed(self, peer: PeerId) -> None:
        self.failures.append(peer)
        self.track_record.failed(peer)

    def succeeded(self, peer: PeerId) -> None:
        self.track_record.succeeded(peer)

    def shown(self, peer: PeerId, throughput: float) -> None:
        self.track_record.shown(peer, throughput)


@dataclass
class Client:
    """A client."""

    ip: str
    identity: Identity
    connections: Connections
    finder: Finder
    opener: ChainOpener
    tasks: trio.Nursery
    rng: Random

    async def session(
        self,
        blocks: Span,
        *,
        max_rows: int = 1,
        max_length: int = 512,
        max_rollback: int = 512,
        prompt_length: int = 0,
        adapter: str = "",
        own_adapter: Lora | None = None,
        width: int = WIDTH,
        **more: object,
    ) -> Session:
        terms = Terms(
            model=MODEL,
            size=SessionSize(max_length, max_rows, max_rollback, prompt_length),
            max_steps=4,
            dtype="float32",
            codec="exact",
            timeout_ms=2000,
            adapter=adapter,
            own_adapter=own_adapter,
        )
        patience = more.pop("patience", Patience())
        assert isinstance(patience, Patience)
        session = Session(SessionTools(self.finder, self.opener, self.rng), SessionSpec(blocks, width, terms, patience))
        await self.tasks.start(session.run)
        return session


class Caller:
    """A client that sends each message by hand, so that it can break every rule."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.ip = client.ip
        self.identity = client.identity
        self.connections = client.connections

    async def stream(self, host: Host, protocol: str = INFER_PROTOCOL) -> Stream:
        return await self.connections.open_stream(
            host.peer_id, protocol, addresses=host.connections.listen_addresses, priority=Priority.DECODE
        )

    def opening(self, host: Host, **fields: Any) -> OpenSession:
        """An `open` for all blocks that the host serves, with `fields` changed."""
        asked: dict[str, Any] = {
            "session": b"s" * 16,
            "hop": 0,
            "epoch": 0,
            "model": MODEL,
            "start": host.span.start,
            "end": host.span.end,
            "max_length": 256,
        }
        return OpenSession(**asked | fields)

    async def ask(self, stream: Stream, message: Message, body: Sequence[memoryview] = ()) -> Message:
        """Send a message and return the next one that comes."""
        await stream.send(message.to_header(), body)
        return await self.hear(stream)

    async def hear(self, stream: Stream) -> Message:
        raw = await stream.receive(max_body=2**22)
        return parse(raw.header, (*CONTROL_FROM_HOP, *LINK_FROM_DOWNSTREAM))

    async def open(self, host: Host, **fields: Any) -> Stream:
        """A control stream whose session was granted."""
        stream = await self.stream(host)
        said = await self.ask(stream, self.opening(host, **fields))
        assert isinstance(said, Opened), said
        return stream

    async def refused(self, host: Host, **fields: Any) -> PeerdError:
        """The error with which an `open` is refused."""
        stream = await self.stream(host)
        said = await self.ask(stream, self.opening(host, **fields))
        assert isinstance(said, Failure), said
        with pytest.raises(trio.EndOfChannel):
            await stream.receive()
        return said.error

    def ticket(self, sender: PeerId, host: Host, *, signer: Identity | None = None, **fields: Any) -> bytes:
        """Permission for `sender` to push to `host`, as hop 1 of the session of `opening`."""
        said: dict[str, Any] = {
            "session": b"s" * 16,
            "hop": 1,
            "epoch": 0,
            "sender": sender,
            "receiver": host.peer_id,
            "expires": int(unix_now()) + 60,
        }
        return sign_ticket(signer or self.identity, Ticket(**said | fields))

    def next_hop(self, sender: Host, host: Host, **fields: Any) -> NextHop:
        record = host.offer().peer_record
        assert record is not None
        return NextHop(self.ticket(sender.peer_id, host, **fields), record.encode())


class Swarm:
    """Hosts and clients on one in-memory network, 5 ms apart; `ips` is the form of their addresses."""

    ips = "10.0.0.{}"

    def __init__(self, tasks: trio.Nursery) -> None:
        self.network = MemoryNetwork(latency_s=0.005)
        self.hosts: list[Host] = []
        self._tasks = tasks
        self._next = 1

    def _new(self) -> tuple[str, Identity]:
        number, self._next = self._next, self._next + 1
        return self.ips.format(number), Identity.from_seed(number.to_bytes(32, "big"))

    async def serve(
        self,
        start: int,
        end: int,
        *,
        kv_tokens: int = 4096,
        step_s: float = 0.01,
        batch_tokens: int = 256,
        engine_type: type[FakeEngine] = FakeEngine,
        client_adapters: int = 0,
        weight_of: Callable[[PeerId], float] = lambda _peer: 1.0,
        asks_for_receipts: bool = True,
        head: ServedHead | None = None,
    ) -> Host:
        """A server of blocks, whose batches take `step_s`."""
        engine = engine_type(Span(start, end), hidden_size=WIDTH, kv_tokens=kv_tokens, batch_tokens=batch_tokens)
        return await self.serve_engine(
            engine,
            step_s=step_s,
            client_adapters=client_adapters,
            weight_of=weight_of,
            asks_for_receipts=asks_for_receipts,
            head=head,
        )

    async def serve_engine(
        self,
        engine: BaseEngine,
        *,
        step_s: float = 0.01,
        client_adapters: int = 0,
        weight_of: Callable[[PeerId], float] = lambda _peer: 1.0,
        asks_for_receipts: bool = True,
        head: ServedHead | None = None,
    ) -> Host:
        """A server with this engine, whose batches, and slices of training, take `step_s`."""

        async def run_batch(run: Callable[[Any], Any], batch: Any) -> Any:
            await trio.sleep(step_s)
            return run(batch)

        ip, identity = self._new()
        task, room = EngineTask(engine, run_batch=run_batch), AdapterRoom(client_adapters)
        receipts = ReceiptBook(unix_now)
        attach = partial(Server.attach, weight_of=weight_of, on_receipt=receipts.add if asks_for_receipts else None)
        host: Host = await self._tasks.start(self._run_host, ip, identity, task, room, head, receipts, attach)
        self.hosts.append(host)
        return host

    async def _run_host(
        self,
        ip: str,
        identity: Identity,
        task: EngineTask,
        room: AdapterRoom,
        head: ServedHead | None,
        receipts: ReceiptBook,
        attach: Callable[[Server, Connections], None],
        task_status: trio.TaskStatus[Host],
    ) -> None:
        server = Server(unix_now)
        async with open_tasks() as tasks:
            await tasks.start(server.run)
            async with open_connections(
                identity,
                transport=self.network.transport(ip),
                listen=[Multiaddr.parse(f"/ip4/{ip}/tcp/4000/ws")],
                handlers=server.handlers,
                now=unix_now,
            ) as connections:
                attach(server, connections)
                server.serve(ServedSpan(MODEL, MAX_LENGTH, task, room, head))
                host = Host(ip, identity, task.engine.span, server, task, connections, receipts)
                task_status.started(host)
                await trio.sleep_forever()

    async def peer_record(self, peer_id: PeerId) -> SignedRecord | None:
        """As the directory does it."""
        await trio.lowlevel.checkpoint()
        return next((host.offer().peer_record for host in self.hosts if host.peer_id == peer_id), None)

    def kill(self, host: Host) -> None:
        """The process dies: connections break, and nothing answers."""
        host.online = False
        self.network.kill(host.ip)

    def freeze(self, host: Host) -> None:
        """The process hangs: nothing that it sends or is sent arrives, and nothing breaks."""
        host.online = False
        self._part(host.ip)

    def vanish(self, client: Client) -> None:
        """The client's machine is gone for good, with its connections."""
        self._part(client.ip)
        self.network.kill(client.ip)

    def _part(self, ip: str) -> None:
        for number in range(1, self._next):
            self.network.partition(ip, self.ips.format(number))

    async def caller(self) -> Caller:
        """A client that may break the rules."""
        return Caller(await self.client())

    async def client(self) -> Client:
        """A client."""
        client: Client = await self._tasks.start(self._run_client, *self._new())
        return client

    async def _run_client(self, ip: str, identity: Identity, task_status: trio.TaskStatus[Client]) -> None:
        rng = Random(ip)
        async with open_connections(
            identity, transport=self.network.transport(ip), handlers={}, now=unix_now
        ) as connections:
            opener = ChainOpener(connections, identity, self, unix_now, rng.randbytes)
            task_status.started(Client(ip, identity, connections, Finder(self), opener, self._tasks, rng))
            await trio.sleep_forever()


@asynccontextmanager
async def _open_swarm() -> AsyncIterator[Swarm]:
    async with open_tasks() as tasks:
        yield Swarm(tasks)


@pytest.fixture
def open_swarm() -> Callable[[], AbstractAsyncContextManager[Swarm]]:
    """`async with open_swarm() as swarm:` an empty swarm, torn down at the end."""
    return _open_swarm


@pytest.fixture
def whole_forward() -> Callable[[torch.Tensor, int], torch.Tensor]:
    """The result of a model of so many blocks for a whole row: `[n, width]` to `[n, width]`."""
    return lambda hidden, blocks: fake_forward(hidden, Span(0, blocks))


TINY_WIDTH = 32
TINY_BLOCKS = 8


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama of 8 blocks of width 32, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=TINY_BLOCKS,
        hidden_size=TINY_WIDTH,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


@pytest.fixture
def serve_tiny(tiny_llama: Path) -> Iterator[Callable[..., Awaitable[Host]]]:
    """`await serve_tiny(swarm, span)`: a host with a real engine over blocks of `tiny_llama`."""
    from peerd.compute.attention.attention import register_attention
    from peerd.compute.checkpoint.opening import open_checkpoint
    from peerd.compute.engine.engine import Engine
    from peerd.compute.model.span_model import load_span

    with open_checkpoint(tiny_llama) as checkpoint:

        async def serve(
            swarm: Swarm,
            span: Span,
            *,
            step_s: float = 0.01,
            pass_bytes: int = 2**27,
            dtype: torch.dtype = torch.float32,
            overflows: bool = False,
        ) -> Host:
            model = load_span(checkpoint, span, dtype=dtype, attention=register_attention())
            if overflows:
                # As published models do in float16, whose activations it cannot hold.
                model.layers[-1].get_parameter("mlp.down_proj.weight").fill_(6e4)
            return await swarm.serve_engine(Engine(model, kv_tokens=256, pass_bytes=pass_bytes), step_s=step_s)

        yield serve


def _byte_characters() -> dict[int, str]:
    """How byte-level BPE writes each byte: printable ones as themselves, others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Each byte is a token with its own number; an end-of-sequence token comes after them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {character: byte for byte, character in _byte_characters().items()}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
