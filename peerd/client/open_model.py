"""Opens a model that a swarm serves, or only its blocks, over a peer that is running."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

import trio

from peerd.checkpoints import fetch_head
from peerd.client.audits.auditor import Auditor
from peerd.client.blocks import ModelFacts, ServedBlocks
from peerd.client.finding.finder import SwarmFinder
from peerd.client.finding.scout import FIRST_WAIT_S, Scout
from peerd.client.grammars.checking import open_grammar_check
from peerd.client.model import SwarmModel
from peerd.client.session.opener import ChainOpener
from peerd.client.speculation.speculation import DraftSource, Speculation
from peerd.compute.adapters.linear_layers import linear_layers
from peerd.compute.checkpoint.tokenizer import generation_config, load_tokenizer
from peerd.compute.families.layer_kinds import layer_kinds
from peerd.compute.model.head import Head, load_head_model, load_input_side, load_output_side
from peerd.compute.model.rotary import changed_beyond, follow_length
from peerd.exchange.head_task import HeadTask
from peerd.protocol.encoding.tensors import DTYPE_NAMES, DTYPES
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.messages.session import MAX_LENGTH
from peerd.protocol.span import Span
from peerd.trio_tools import import_in_thread, open_tasks

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from peerd.client.audits.policy import AuditPolicy
    from peerd.compute.checkpoint.checkpoint import Checkpoint
    from peerd.compute.checkpoint.hub.settings import HubSettings
    from peerd.discovery.discovery import Discovery
    from peerd.discovery.prober import RttProber
    from peerd.net.connections import Connections
    from peerd.protocol.identity import Identity, PeerId
    from peerd.routing.chains.rules import ChainRules


class Client(Protocol):
    """The parts of a running peer that a model of its swarm uses."""

    identity: Identity
    connections: Connections
    discovery: Discovery
    rules: ChainRules | None
    audit: AuditPolicy

    @property
    def peer_id(self) -> PeerId:
        """The peer's own PeerId."""

    @property
    def hub(self) -> HubSettings:
        """How our own adapters are fetched from the hub."""

    @property
    def prober(self) -> RttProber:
        """The prober, which measures the delays to other peers."""


@asynccontextmanager
async def open_model(client: Client, checkpoint: Checkpoint, *, remote_head: bool = False) -> AsyncIterator[SwarmModel]:
    """A model of the swarm, its head and tokenizer read from `checkpoint`. Raises CheckpointError.

    remote_head: have last hops draw tokens where they can. The head is then not read before an answer needs it.
    """
    await fetch_head(checkpoint)
    side = await trio.to_thread.run_sync(_read_client_side, checkpoint, remote_head)
    async with _open_route(client, side.facts) as route, open_grammar_check() as check, open_tasks() as tasks:
        task = HeadTask(side.head, load_output=partial(_load_output, checkpoint) if remote_head else None)
        tasks.start_soon(task.run)
        yield SwarmModel(
            side.facts,
            task,
            side.tokenizer,
            side.generation_config,
            route.finder,
            route.opener,
            route.tasks,
            route.scout,
            client.hub,
            route.auditor,
            check,
            remote_head=remote_head,
        )


@asynccontextmanager
async def open_drafting(model: SwarmModel, checkpoint: Checkpoint, device: str) -> AsyncIterator[None]:
    """Let the small model in `checkpoint` guess tokens for the answers that begin in the block.

    Raises CheckpointError, and InvalidRequest if its tokens are others or it does not fit into the device's memory.
    """
    # It needs the engine, which other clients do not.
    await import_in_thread("peerd.client.speculation.draft_model")
    from peerd.client.speculation.draft_model import open_draft

    async with open_draft(checkpoint, model.tokenizer, model.vocab_size, model.facts.name, device=device) as draft:
        with _guessed_by(model, draft):
            yield


@asynccontextmanager
async def drafting_head(model: SwarmModel, folder: Path, device: str) -> AsyncIterator[None]:
    """Let the draft head in `folder` guess tokens for the answers that begin in the block.

    Raises CheckpointError, and InvalidRequest if it is for a model of other sizes or does not fit into the device's
    memory.
    """
    if model.remote_vocab is not None:
        raise InvalidRequest(
            f"{folder.name} guesses from hidden states, which a client does not get whose last server draws the tokens:"
            " leave out the draft head, or the remote head"
        )
    await import_in_thread("peerd.client.speculation.draft_head")
    from peerd.client.speculation.draft_head import load_draft_head

    facts = model.facts
    load = partial(load_draft_head, folder, model.head, facts.name, facts.digest, device=device)
    with _guessed_by(model, await trio.to_thread.run_sync(load)):
        yield


@contextmanager
def _guessed_by(model: SwarmModel, source: DraftSource) -> Iterator[None]:
    before = model.speculation
    model.speculation = Speculation(model=source)
    try:
        yield
    finally:
        model.speculation = before


@asynccontextmanager
async def open_blocks(client: Client, facts: ModelFacts) -> AsyncIterator[ServedBlocks]:
    """The blocks of a model of the swarm, without a head."""
    async with _open_route(client, facts) as route:
        yield ServedBlocks(facts, route.finder, route.opener, route.tasks, route.scout, client.hub, route.auditor)


def facts_of(checkpoint: Checkpoint) -> ModelFacts:
    """The facts about the model in `checkpoint` that a client needs."""
    return ModelFacts(
        name=checkpoint.name,
        digest=checkpoint.model_digest,
        block_count=checkpoint.block_count,
        width=checkpoint.hidden_size,
        max_length=checkpoint.max_length or MAX_LENGTH,
        dtype=DTYPE_NAMES[checkpoint.dtype],
        model_type=checkpoint.family.model_type,
        ropes_follow_length=follow_length(checkpoint.config),
        ropes_change_at=changed_beyond(checkpoint.config),
        hub_name=f"{checkpoint.hub_id}@{checkpoint.commit}" if checkpoint.hub_id else "",
        limits_rollback=any(kind.window or kind.chunk or kind.state for kind in layer_kinds(checkpoint.config)),
    )


@dataclass(frozen=True, slots=True)
class _Route:
    """The finder and opener of chains through a model's blocks, and the nursery of their tasks."""

    finder: SwarmFinder
    opener: ChainOpener
    tasks: trio.Nursery
    scout: Scout
    auditor: Auditor | None


@asynccontextmanager
async def _open_route(client: Client, facts: ModelFacts) -> AsyncIterator[_Route]:
    """Yields once the delays to the servers are measured, or after FIRST_WAIT_S."""
    random = Random(os.urandom(16))
    discovery = client.discovery
    finder = SwarmFinder(
        discovery.directory,
        discovery.track_record,
        facts.digest,
        facts.block_count,
        random,
        client.rules,
        position_bytes=facts.width * DTYPES[facts.dtype].itemsize,
        connected=lambda: (client.peer_id, *client.connections.live),
    )
    opener = ChainOpener(client.connections, client.identity, discovery.directory, discovery.clock, os.urandom)
    auditor = _auditor_of(client, facts, finder, opener, random) if client.audit.probability else None
    async with open_tasks() as tasks:
        scout = Scout(finder, client.prober, Span(0, facts.block_count), random)
        keep = client.connections.containment.keep_running
        tasks.start_soon(partial(keep, scout.run, what="measuring servers"))
        if auditor is not None:
            tasks.start_soon(partial(keep, auditor.run, what="auditing answers"))
        with trio.move_on_after(FIRST_WAIT_S):
            await scout.ready.wait()
        yield _Route(finder, opener, tasks, scout, auditor)


def _auditor_of(client: Client, facts: ModelFacts, finder: SwarmFinder, opener: ChainOpener, random: Random) -> Auditor:
    discovery = client.discovery
    standing = discovery.track_record.standing
    return Auditor(client.audit, finder, opener, standing, discovery.convict, random, facts.width)


@dataclass(frozen=True, slots=True)
class _ClientSide:
    facts: ModelFacts
    head: Head
    tokenizer: Any
    generation_config: Any


def _read_client_side(checkpoint: Checkpoint, remote_head: bool) -> _ClientSide:
    """Blocks the thread; run it in a worker thread."""
    tokenizer = load_tokenizer(checkpoint)
    built = load_input_side(checkpoint) if remote_head else load_head_model(checkpoint)
    adaptable = frozenset(linear_layers(built.layers, layer_kinds(checkpoint.config)))
    head = Head(built.model, checkpoint.family)
    if not remote_head:
        head.make_shortlist()
    return _ClientSide(
        replace(facts_of(checkpoint), adaptable=adaptable),
        head,
        tokenizer,
        generation_config(checkpoint, tokenizer),
    )


def _load_output(checkpoint: Checkpoint) -> Head:
    """What computes logits, for a client that had meant to have that done elsewhere. Blocks the thread."""
    log.info(
        "reading the head of %s: its last server draws no tokens, or an answer needs what it cannot do", checkpoint.name
    )
    head = load_output_side(checkpoint)
    head.make_shortlist()
    return head
