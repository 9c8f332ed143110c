"""A swarm of real engines on a tiny model, some of which lie, and a client that audits every answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
import torch
import trio
import trio.testing

from peerd.client.audits.auditor import Auditor
from peerd.client.audits.policy import AuditPolicy
from peerd.client.finding.finder import Patience
from peerd.client.session.mender import SessionSpec, SessionTools
from peerd.client.session.opener import Terms
from peerd.client.session.session import Session
from peerd.compute.attention.attention import register_attention
from peerd.compute.audits.calibrate import measure, thresholds
from peerd.compute.audits.thresholds import Numerics, Thresholds
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.engine import Engine
from peerd.compute.model.span_model import SpanModel, load_span
from peerd.compute.steps import Batch, BatchOutput
from peerd.protocol.identity import PeerId
from peerd.protocol.rows import SessionSize
from peerd.protocol.span import Span
from tests.peerd.conftest import MODEL, Client, Host, Swarm

BLOCKS = Span(0, 9)
SPANS = (Span(0, 3), Span(3, 6), Span(6, 9))
WIDTH = 64
FULL, HALF, INT8, NF4 = (
    Numerics("float32", "none"),
    Numerics("bfloat16", "none"),
    Numerics("float32", "int8"),
    Numerics("float32", "nf4"),
)
CLASSES = (FULL, HALF, INT8, NF4)
LENGTH = 34


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random Llama of 9 blocks, as wide as a group of quantized weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=BLOCKS.end,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=256,
        initializer_range=0.08,
    )
    torch.manual_seed(11)
    path = tmp_path_factory.mktemp("wide")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def checkpoint(wide_llama: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(wide_llama) as checkpoint:
        yield checkpoint


def texts(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def measured_thresholds(checkpoint: Checkpoint) -> Thresholds:
    return thresholds(measure(checkpoint, texts(2, 1), SPANS, CLASSES), {"model": "tiny"})


class Lie:
    """How a server lies: what it does to its model, and what it makes of a batch's results."""

    def spoil(self, model: SpanModel) -> None:
        """Change the model that was loaded."""

    def change(self, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What it sends instead of `output`."""
        return output


class LyingEngine(Engine):
    """An engine that is honest until `lies`."""

    lie = Lie()
    lies = False

    def run(self, batch: Batch) -> BatchOutput:
        output = super().run(batch)
        if not self.lies:
            return output
        changed = []
        for piece, hidden in zip(batch.pieces, output.hidden, strict=True):
            inputs = piece.step.hidden[piece.offset : piece.offset + piece.count]
            changed.append(self.lie.change(inputs.float(), hidden.float()).to(hidden.dtype))
        return BatchOutput(tuple(changed), output.finite)


@dataclass
class Tribunal:
    """A swarm of three hops, a client, and what its auditor does."""

    swarm: Swarm
    client: Client
    auditor: Auditor
    load: Callable[..., Engine]
    convicted: list[PeerId]
    #: Whether its sessions ask for sketches.
    is_sketched: bool = False

    async def serve(
        self,
        span: Span,
        numerics: Numerics = FULL,
        *,
        announced: Numerics | None = None,
        lie: Lie | None = None,
        step_s: float = 0.01,
    ) -> Host:
        """A server of blocks that announces `announced`, and lies if it is told how."""
        host = await self.swarm.serve_engine(self.load(span, numerics, lie), step_s=step_s)
        said = announced or numerics
        host.dtype, host.quantization = said.dtype, said.quantization
        return host

    async def serve_all(self, numerics: Numerics = FULL) -> list[Host]:
        """Honest servers of all blocks."""
        return [await self.serve(span, numerics) for span in SPANS]

    async def open(self, prompt_length: int = 10, max_rollback: int = 0, max_rows: int = 1) -> Session:
        """A session of the user's, which is watched."""
        client = self.client
        size = SessionSize(64 if max_rows > 1 else 128, max_rows, max_rollback, prompt_length)
        terms = Terms(MODEL, size, max_steps=4, dtype="float32", codec="exact", timeout_ms=2000)
        terms = replace(terms, are_sketched=self.is_sketched)
        tools = SessionTools(client.finder, client.opener, client.rng)
        session = Session(tools, SessionSpec(BLOCKS, WIDTH, terms, Patience()))
        await client.tasks.start(session.run)
        self.auditor.watch(session, BLOCKS, terms)
        return session

    async def answer(self, seed: int = 5) -> None:
        """One answer of the user's: a prompt, and a token after the other."""
        session = await self.open()
        await run_text(session, seed)
        session.close()
        await trio.testing.wait_all_tasks_blocked()

    async def audit(self) -> None:
        """Wait for the audits of all answers."""
        await self.auditor.wait_done()


async def run_text(session: Session, seed: int) -> None:
    (row,) = texts(1, seed)
    await session.step(row[:10])
    for position in range(10, LENGTH):
        await session.step(row[position : position + 1])


@pytest.fixture(scope="session")
def loaded() -> dict[tuple[Span, Numerics], SpanModel]:
    """The models that tests have read, of which each server gets a copy."""
    return {}


@pytest.fixture
def open_tribunal(
    open_swarm: Callable[[], AbstractAsyncContextManager[Swarm]],
    checkpoint: Checkpoint,
    measured_thresholds: Thresholds,
    loaded: dict[tuple[Span, Numerics], SpanModel],
) -> Callable[[], object]:
    """`async with open_tribunal() as tribunal:` a swarm without servers, and a client that audits every answer."""

    def load(span: Span, numerics: Numerics, lie: Lie | None) -> Engine:
        if (span, numerics) not in loaded:
            dtype, quantize = getattr(torch, numerics.dtype), numerics.quantization
            loaded[span, numerics] = load_span(
                checkpoint, span, dtype=dtype, attention=register_attention(), quantize=quantize
            )
        model = deepcopy(loaded[span, numerics])
        engine = LyingEngine(model, kv_tokens=512)
        if lie is not None:
            lie.spoil(model)
            engine.lie, engine.lies = lie, True
        return engine

    @asynccontextmanager
    async def opened(ips: str = Swarm.ips) -> AsyncIterator[Tribunal]:
        async with open_swarm() as swarm:
            swarm.ips = ips
            client = await swarm.client()
            convicted: list[PeerId] = []

            async def convict(peer: PeerId, why: str) -> None:
                await trio.lowlevel.checkpoint()
                convicted.append(peer)
                client.finder.track_record.convictions.convict(peer, why)

            standing = client.finder.track_record.standing
            policy = AuditPolicy(1.0, measured_thresholds)
            auditor = Auditor(policy, client.finder, client.opener, standing, convict, Random(2), WIDTH)
            client.tasks.start_soon(auditor.run)
            yield Tribunal(swarm, client, auditor, load, convicted)

    return opened
