"""Computes a whole row along given servers, while the user's own sessions do not need them.

Nobody is blamed for what goes wrong here: the servers were asked for a favour.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
import trio

from peerd.client.audits.others import InUse
from peerd.client.finding.finder import Patience
from peerd.client.session.mender import SessionSpec, SessionTools
from peerd.client.session.opener import ChainOpener, Terms
from peerd.client.session.session import Session
from peerd.protocol.errors import NoChain, PeerdError
from peerd.protocol.identity import PeerId
from peerd.protocol.rows import SessionSize
from peerd.protocol.span import Span
from peerd.routing.chains.adapter_choice import NO_ADAPTER, AdapterNeed
from peerd.routing.chains.chain import Between, Chain, ChainNeeds, Hop
from peerd.routing.directory.offer import Offer
from peerd.trio_tools import open_tasks

# A server that does not answer within this is left alone; a prefill of a long row over a slow line takes that long.
PREFILL_S = 120.0
# How often to look whether the user needs the servers.
LOOK_S = 0.05
# One attempt at opening each hop: a server that is full or gone is not waited for.
NO_PATIENCE = Patience(missing_s=0.0, busy_s=0.0)


class Unfinished(Exception):
    """An audit cannot go on, because servers are full, gone, silent or needed by the user. Nobody is to blame."""


class Prefills:
    """Runs rows `width` wide along chains, each in a session of its own."""

    def __init__(self, opener: ChainOpener, rng: random.Random, width: int, in_use: InUse) -> None:
        #: How many positions servers computed for audits, times blocks; and how many bytes of results came back.
        self.computed = 0
        self.received_bytes = 0
        self._opener = opener
        self._rng = rng
        self._width = width
        self._in_use = in_use

    def __repr__(self) -> str:
        return f"<Prefills computed={self.computed} received={self.received_bytes}>"

    async def compute(self, hops: Sequence[Hop], inputs: torch.Tensor, terms: Terms, first: int = 0) -> torch.Tensor:
        """The outputs for the positions from `first` on, `[length - first, width]`. Raises Unfinished."""
        peers = frozenset(hop.peer_id for hop in hops)
        blocks = Span(hops[0].span.start, hops[-1].span.end)
        # The same lengths as in the session: the ropes of some models depend on them.
        size = SessionSize(terms.size.max_length, prompt_length=terms.size.prompt_length)
        terms = replace(terms, size=size, are_sketched=False)
        tools = SessionTools(_OneChain(hops), self._opener, self._rng)
        result: torch.Tensor | None = None
        try:
            with trio.fail_after(PREFILL_S):
                await self._wait_in_use(peers, False)
                session = Session(tools, SessionSpec(blocks, self._width, terms, NO_PATIENCE))
                async with open_tasks() as tasks:
                    await tasks.start(session.run)
                    tasks.start_soon(self._give_way, peers, tasks.cancel_scope)
                    if first:
                        await session.step(inputs[:first], want="none")
                    result = await session.step(inputs[first:], want="all")
        except (PeerdError, trio.ClosedResourceError, trio.TooSlowError) as error:
            raise Unfinished(str(error) or f"no answer within {PREFILL_S:g} s") from error
        if result is None:
            raise Unfinished("the user's own sessions needed the servers")
        self.computed += len(inputs) * len(blocks)
        self.received_bytes += result.nbytes
        return result

    async def _give_way(self, peers: frozenset[PeerId], scope: trio.CancelScope) -> None:
        """Cancel `scope` as soon as a session of the user uses one of the peers."""
        await self._wait_in_use(peers, True)
        scope.cancel()

    async def _wait_in_use(self, peers: frozenset[PeerId], wanted: bool) -> None:
        while bool(peers & self._in_use()) != wanted:  # noqa: ASYNC110 - sessions do not tell when their chains change
            await trio.sleep(LOOK_S)


class _OneChain:
    """A finder that knows one chain, gives it once, and replaces nobody."""

    def __init__(self, hops: Sequence[Hop]) -> None:
        self._chain: Chain | None = Chain(tuple(hops), cost_s=0.0)

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
        return self._take(blocks)

    def plan(self, blocks: Span, needs: ChainNeeds, exclude: Collection[PeerId]) -> Chain:
        return self._take(blocks)

    def _take(self, blocks: Span) -> Chain:
        chain, self._chain = self._chain, None
        if chain is None:
            raise NoChain(f"the servers of blocks {blocks} did not finish", ((blocks.start, blocks.end),))
        return chain

    async def adapter_id(self, name: str, blocks: Span) -> str:
        raise NoChain(f"adapter {name} was resolved before", ((blocks.start, blocks.end),))

    async def offers(self, max_age_s: float) -> list[Offer]:
        await trio.lowlevel.checkpoint()
        return []

    def avoided(self) -> frozenset[PeerId]:
        return frozenset()

    def failed(self, peer: PeerId) -> None:
        """Nobody is blamed."""

    def succeeded(self, peer: PeerId) -> None:
        """Nor praised: a prefill is no session of the user's."""

    def shown(self, peer: PeerId, throughput: float) -> None:
        """Nor is its speed noted."""
