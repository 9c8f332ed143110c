"""Makes training passes: finds chains for the rows, cuts the rows into micro-batches, and runs the forward."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from peerd.client.finding.finder import ChainFinder, Patience
from peerd.client.training.lane import LaneTerms
from peerd.client.training.lanes import TrainingChain
from peerd.client.training.rows import Part, cut, positions_each, split
from peerd.client.training.several_chains import plan_several
from peerd.client.training.trained import Trained
from peerd.client.training.training_pass import MicroBatchRun, Pass
from peerd.net.connections import Connections
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.span import Span
from peerd.routing.chains.adapter_choice import AdapterNeed
from peerd.routing.chains.chain import ChainNeeds
from peerd.trio_tools import at_once

# The assumed number of hops before a chain is planned.
PLANNED_HOPS = 4


@dataclass(frozen=True, slots=True)
class _Order:
    """What a caller wants of a pass, for each of its chains."""

    rows: Sequence[int]
    blocks: Span
    trained: Trained
    adapter: str
    codec: str
    patience: Patience


class PassMaker:
    """Runs forwards over one model, in the name of one client."""

    def __init__(
        self, finder: ChainFinder, connections: Connections, model: bytes, width: int, dtype: str, rng: random.Random
    ) -> None:
        self._finder = finder
        self._connections = connections
        self._model = model
        self._width = width
        # Small gradients would vanish in float16.
        self._dtype = "float32" if dtype == "float16" else dtype
        self._rng = rng

    async def forward(
        self,
        hidden: torch.Tensor,
        rows: Sequence[int],
        blocks: Span,
        trained: Trained,
        *,
        adapter: str = "",
        codec: str = "exact",
        keep: bool = True,
        patience: Patience | None = None,
    ) -> Pass:
        """Run rows of these lengths through `blocks`: `[sum of rows, width]`, or any shape with as many values.

        Without `keep` no backward can follow. Raises InvalidRequest, NoChain, Overloaded.
        """
        packed = self._check(hidden, rows)
        trained.check(blocks, rows, self._width)
        order = _Order(rows, blocks, trained, adapter, codec, patience or Patience())
        micros = await self._micro_batches(order)
        done = Pass(hidden, micros, blocks, trained)
        try:
            outputs = await at_once([partial(micro.forward, packed[micro.part], keep=keep) for micro in micros])
        except BaseException:
            done.close()
            raise
        done.output = torch.cat(outputs).view(hidden.shape)
        if not keep:
            done.close()
        return done

    async def _micro_batches(self, order: _Order) -> list[MicroBatchRun]:
        rows = order.rows
        if order.trained.has_row_prompts:
            # A lane has one prompt for all its requests, so rows with their own prompts need lanes of their own.
            parts = cut(rows, positions_each(sum(rows), 1))
            chains = [self._new_chain(order, numbers) for numbers, _, _ in parts]
            await _open_all(chains)
            return [MicroBatchRun(chain, *part) for chain, part in zip(chains, parts, strict=True)]
        return [
            MicroBatchRun(chain, *part)
            for chain, within in await self._chains(order)
            for part in _cut_for(chain, rows, within)
        ]

    async def _chains(self, order: _Order) -> list[tuple[TrainingChain, range]]:
        """Open chains, each with the numbers of the rows that go over it."""
        rows = order.rows
        first = self._new_chain(order, range(len(rows)))
        alone = await first.plan()
        chains = [(first, range(len(rows)))]
        needs = ChainNeeds(positions=first.positions, adapter=AdapterNeed(order.adapter), requests=1)
        shares = plan_several(
            alone, min(first.requests, len(rows)), lambda used: self._finder.plan(order.blocks, needs, used)
        )
        if len(shares) > 1:
            chains = []
            for share, within in zip(shares, split(rows, [share.requests for share in shares]), strict=True):
                if within:
                    chains.append((self._new_chain(order, within), within))
                    chains[-1][0].take(share.chain)
        await _open_all([chain for chain, _ in chains])
        return chains

    def _new_chain(self, order: _Order, numbers: Sequence[int]) -> TrainingChain:
        """A chain for these rows of the pass."""
        parameters = order.trained.parameters(order.blocks, numbers)
        terms = LaneTerms(self._model, self._dtype, order.codec, order.adapter, parameters)
        total = sum(order.rows[number] for number in numbers)
        requests = len(cut([order.rows[number] for number in numbers], positions_each(total, PLANNED_HOPS)))
        return TrainingChain(
            self._finder,
            self._connections,
            order.blocks,
            self._width,
            terms,
            order.patience,
            self._rng,
            -(-total // requests),
            requests,
        )

    def _check(self, hidden: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """The input as `[sum of rows, width]`. Raises InvalidRequest."""
        if not rows or min(rows) < 1:
            raise InvalidRequest("a pass has rows of at least one position")
        if hidden.shape[-1] != self._width or hidden.numel() != sum(rows) * self._width:
            raise InvalidRequest(
                f"hidden states of shape {list(hidden.shape)} for rows of {sum(rows)} positions of {self._width}"
            )
        if not hidden.isfinite().all():
            raise InvalidRequest("the hidden states have values that are not finite")
        return hidden.detach().reshape(-1, self._width)


async def _open_all(chains: Sequence[TrainingChain]) -> None:
    try:
        await at_once([chain.open for chain in chains])
    except BaseException:
        for chain in chains:
            chain.close()
        raise


def _cut_for(chain: TrainingChain, rows: Sequence[int], within: range) -> list[Part]:
    """The micro-batches of these rows, so that all hops of the chain are busy."""
    total = sum(rows[number] for number in within)
    return cut(rows, positions_each(total, chain.hops), within)
