"""The blocks of one model of a swarm, as a client uses them: sessions, and forward passes with their backward.

Hidden states go in and come out. `SwarmModel` adds a head, which turns text into hidden states and back; the
Transformers facade has a head of its own.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from peerd.client.finding.finder import ChainFinder, Patience
from peerd.client.session.mender import SessionSpec, SessionTools
from peerd.client.session.opener import ChainOpener, Terms
from peerd.client.session.session import Session
from peerd.compute.adapters.lora import BlockModule, LoraAdapter, within
from peerd.compute.errors import AdapterError
from peerd.protocol.errors import ContextTooLong, InvalidRequest
from peerd.protocol.messages.adapters import is_adapter_id
from peerd.protocol.messages.session import DEFAULT_MAX_STEPS, MAX_ROWS, PROMPT_LENGTH
from peerd.protocol.rows import SessionSize
from peerd.protocol.span import Span

if TYPE_CHECKING:
    import torch

    from peerd.client.audits.auditor import Auditor
    from peerd.client.finding.scout import Scout
    from peerd.client.training.pass_maker import PassMaker
    from peerd.client.training.trained import LoraPairs, Prefixes
    from peerd.client.training.training_pass import Pass
    from peerd.compute.checkpoint.hub.settings import HubSettings
    from peerd.meters import Meters
    from peerd.protocol.identity import PeerId

# A hop without free memory may keep us waiting this long before we try another chain (spec/sessions/session.md,
# "Opening").
OPEN_TIMEOUT_MS = 2000
# An interrupted answer can be resumed for this long, because servers keep an idle session that long.
RESUME_S = 300.0

Adapter = str | Path | LoraAdapter
"""An adapter's name in the swarm; or your own, in memory, or as a directory or hub id (a text with a slash in it)."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The facts about a model that a client knows without its blocks."""

    name: str
    digest: bytes
    block_count: int
    width: int
    max_length: int
    dtype: str
    # The model's architecture, which determines the names of layers in adapters.
    model_type: str = ""
    #: Whether rotary embeddings follow a text's length (`SessionSize.prompt_length`).
    ropes_follow_length: bool = False
    #: Whether some blocks forget positions that they see no longer, or keep running states, so that a row can be cut
    #: only as far back as its session promised.
    limits_rollback: bool = True
    #: The length beyond which they turn all of a text in another way; None: later positions alone, or none.
    ropes_change_at: int | None = None
    #: The model's name on a hub, with its commit, by which another machine gets the same files; "" if it is on none.
    hub_name: str = ""
    #: The layers that the client's own adapter may adapt, as (block, name). Empty if they were not determined.
    adaptable: frozenset[BlockModule] = frozenset()


class ServedBlocks:
    """The blocks of a model, wherever the swarm serves them. Made by `Peer.blocks`."""

    def __init__(
        self,
        facts: ModelFacts,
        finder: ChainFinder,
        opener: ChainOpener,
        tasks: trio.Nursery,
        scout: Scout | None = None,
        hub: HubSettings | None = None,
        auditor: Auditor | None = None,
    ) -> None:
        self.facts = facts
        #: Audits some of the answers; None: no answer is audited.
        self.auditor = auditor
        self._hub = hub
        self._tools = SessionTools(finder, opener, random.Random(os.urandom(16)))
        self._tasks = tasks
        self._scout = scout
        self._pass_maker: PassMaker | None = None

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.facts.name} {self.facts.digest.hex()[:8]} blocks={self.facts.block_count}>"
        )

    @property
    def meters(self) -> Meters:
        """What the peer counts and times, of which these blocks' answers are a part."""
        return self._tools.opener.connections.meters

    def unreachable(self) -> frozenset[PeerId]:
        """The peers that this process has found to be gone or failing, which no session is given now."""
        return self._tools.finder.avoided()

    def embed(self, token_ids: Sequence[int], start: int = 0) -> torch.Tensor:
        """Turn token ids into the first block's input. Raises InvalidRequest here, because that needs a model's
        head.
        """
        raise InvalidRequest("token ids need the model's head, which these blocks do not have: give hidden states")

    @asynccontextmanager
    async def session(
        self,
        *,
        max_length: int,
        max_rows: int = 1,
        max_rollback: int = 0,
        prompt_length: int = 0,
        blocks: Span | None = None,
        patience: Patience | None = None,
        adapter: Adapter | None = None,
    ) -> AsyncIterator[Session]:
        """A session over `blocks` (default: all), for rows of at most `max_length` positions.

        `prompt_length`, the length of the text that comes first, matters to models whose rotary embeddings follow a
        text's length, `dynamic` and `longrope`: see `SessionSize`.
        `adapter` is the name of one that the swarm serves (or its id, `NAME@DIGEST`), or your own: the directory that
        peft saved, its hub id, or a LoraAdapter. Your own goes to every hop for this session, and ends with it.
        Raises NoChain, Overloaded, ContextTooLong or AdapterError before the body runs.
        """
        session = await self.start_session(
            max_length=max_length,
            max_rows=max_rows,
            max_rollback=max_rollback,
            prompt_length=prompt_length,
            blocks=blocks,
            patience=patience,
            adapter=adapter,
        )
        try:
            await session.open()
            yield session
        finally:
            session.close()

    async def start_session(
        self,
        *,
        max_length: int,
        max_rows: int = 1,
        max_rollback: int = 0,
        prompt_length: int = 0,
        blocks: Span | None = None,
        patience: Patience | None = None,
        adapter: Adapter | None = None,
        head: bool = False,
    ) -> Session:
        """Start a session whose chain opens with its first step. The caller must `close` it. For the arguments see
        `session`. `head`: the last hop draws tokens, where it offers that (`Session.draw`).
        """
        blocks = blocks or Span(0, self.facts.block_count)
        check_session_size(self.facts, max_length, max_rows)
        terms = Terms(
            model=self.facts.digest,
            size=SessionSize(max_length, max_rows, max_rollback, prompt_length),
            max_steps=DEFAULT_MAX_STEPS,
            dtype=self.facts.dtype,
            codec="exact",
            timeout_ms=OPEN_TIMEOUT_MS,
            needs=(PROMPT_LENGTH,) if self.facts.ropes_follow_length else (),
            # In every session, so that no server learns which are checked.
            are_sketched=self.auditor is not None and max_rows == 1 and not head,
            head=head,
        )
        terms = await self._with_adapter(terms, adapter, blocks)
        session = Session(self._tools, SessionSpec(blocks, self.facts.width, terms, patience or Patience()))
        await self._tasks.start(session.run)
        self._watch(session)
        return session

    def _watch(self, session: Session) -> None:
        """Have those told of it who take part in what a session is used for from now on."""
        blocks, terms = session.spec.blocks, session.spec.terms
        # An audit compares hidden states, of which none come back where tokens do.
        if self.auditor is not None and not terms.head:
            self.auditor.watch(session, blocks, terms)
        if self._scout is not None:
            self._scout.watch(session, tokens=terms.tokens, adapter=terms.adapter_need)

    def close_later(self, session: Session) -> None:
        """Close an interrupted session after RESUME_S, unless its user resumes it before."""
        self._tasks.start_soon(self._close_unless_used, session)

    @staticmethod
    async def _close_unless_used(session: Session) -> None:
        asked = session.log.asked
        await trio.sleep(RESUME_S)
        # If the session was resumed, the caller closes it, or calls `close_later` again.
        if session.log.asked == asked:
            session.close()

    async def forward(
        self,
        inputs: torch.Tensor | Sequence[Sequence[int]],
        *,
        rows: Sequence[int] | None = None,
        blocks: Span | None = None,
        prompts: torch.Tensor | None = None,
        lora: LoraPairs | None = None,
        lora_scaling: float = 1.0,
        prefixes: Prefixes | None = None,
        adapter: str = "",
        codec: str = "exact",
        keep: bool = True,
        patience: Patience | None = None,
    ) -> Pass:
        """Run whole rows through `blocks` (default: all) without a cache, for training; `backward` of the result
        follows.

        `inputs` are hidden states `[rows, positions, width]`, or packed `[sum of rows, width]` with the lengths in
        `rows`, or token ids, a list a row. `prompts` `[blocks, 1 or rows, P, width]` are added to the first P positions
        of each block's input. `lora` pairs act beside linear modules; `adapter` is one that the servers have.
        `prefixes`, by block, take the place of the keys and values of each row's first P positions, each `[P, width of
        all key heads]`. Without `keep` there can be no backward. Raises InvalidRequest, NoChain, Overloaded,
        ContextTooLong.
        """
        from peerd.client.training.pass_maker import PassMaker
        from peerd.client.training.rows import as_rows
        from peerd.client.training.trained import Trained

        blocks = blocks or Span(0, self.facts.block_count)

        hidden, lengths = as_rows(inputs, rows, self.embed)
        if max(lengths) > self.facts.max_length:
            raise ContextTooLong(
                f"a row of {max(lengths)} positions, {self.facts.name} takes {self.facts.max_length}: shorten it"
            )
        if self._pass_maker is None:
            facts, tools = self.facts, self._tools
            self._pass_maker = PassMaker(
                tools.finder, tools.opener.connections, facts.digest, facts.width, facts.dtype, tools.rng
            )
        return await self._pass_maker.forward(
            hidden,
            lengths,
            blocks,
            Trained(prompts, lora or {}, lora_scaling, prefixes or {}),
            adapter=await self._adapter_id(adapter, blocks) if adapter else "",
            codec=codec,
            keep=keep,
            patience=patience,
        )

    async def read_adapter(self, path: str | Path, *, any_base: bool = False) -> LoraAdapter:
        """An adapter for this model, from the directory that peft saved, or by its hub id.

        any_base: take one that was trained for another model too, such as another quantization of this one. Raises
        AdapterError.
        """
        read = partial(_read_adapter, path, self.facts, self._hub, any_base=any_base)
        return await trio.to_thread.run_sync(read, abandon_on_cancel=True)

    async def save_adapter(self, adapter: LoraAdapter, path: str | Path, *, base: str = "") -> None:
        """Write an adapter of your own in peft's format, which `read_adapter`, servers and peft read.

        base: the model's hub id or path, for those who read it; the default is the model's name. Raises AdapterError.
        """
        from peerd.compute.adapters.base import TrainedFor
        from peerd.compute.adapters.writing import write_adapter
        from peerd.compute.families.lookup import family_named

        family = family_named(self.facts.model_type)
        made_for = TrainedFor(base or self.facts.name, self.facts.digest.hex())
        await trio.to_thread.run_sync(write_adapter, Path(path), adapter, family, made_for)

    async def _adapter_id(self, adapter: str, blocks: Span) -> str:
        if _is_own(adapter):
            raise AdapterError(
                f"{adapter} is an adapter of your own, and a training pass runs under one that the swarm serves, by its"
                " name: give yours to `session` or `generate`, or train it as `lora`"
            )
        # The name is resolved once: a hop that is replaced in mid-answer must not get another adapter of the same name.
        return adapter if is_adapter_id(adapter) else await self._tools.finder.adapter_id(adapter, blocks)

    async def _with_adapter(self, terms: Terms, adapter: Adapter | None, blocks: Span) -> Terms:
        if adapter is None:
            return terms
        if isinstance(adapter, str) and not _is_own(adapter):
            return replace(terms, adapter=await self._adapter_id(adapter, blocks))
        own = adapter if isinstance(adapter, LoraAdapter) else await self.read_adapter(adapter)
        return replace(terms, own_adapter=within(own.weights, blocks))


def check_session_size(facts: ModelFacts, max_length: int, max_rows: int) -> None:
    """Raises ContextTooLong, InvalidRequest for rows that no session over this model can have."""
    if max_length > facts.max_length:
        raise ContextTooLong(
            f"{max_length} positions wanted (prompt and answer together), {facts.name} takes {facts.max_length}:"
            " shorten one of them"
        )
    if not 1 <= max_rows <= MAX_ROWS:
        raise InvalidRequest(f"{max_rows} rows wanted: a session has 1 to {MAX_ROWS}; use several sessions")


def _is_own(adapter: str) -> bool:
    """Whether a text means an adapter's files, here or on the hub, rather than a name: no name has a slash in it."""
    return "/" in adapter or os.sep in adapter or adapter in (".", "..", "~")


def _read_adapter(path: str | Path, facts: ModelFacts, hub: HubSettings | None, *, any_base: bool) -> LoraAdapter:
    """Blocks; run it in a thread."""
    from peerd.compute.adapters.file import open_adapter
    from peerd.compute.families.lookup import family_named

    with open_adapter(path, family_named(facts.model_type), hub) as file:
        if not any_base:
            file.check_base(facts.digest)
        last = max(block for block, _ in file.modules)
        if last >= facts.block_count:
            raise AdapterError(f"{file.path}: it adapts block {last}, {facts.name} has {facts.block_count}")
        file.check_complete(sorted(facts.adaptable))
        return LoraAdapter(file.read())
