"""The blocks of a model through a daemon on this machine, so that many programs share its one peer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from peerd.client.blocks import ModelFacts, check_session_size
from peerd.client.training.trained import LORA_A, LORA_B, LoraPairs, Prefixes, Trained
from peerd.compute.adapters.lora import DeepPrompt, LoraAdapter
from peerd.local.channel import Parameters, open_channel
from peerd.local.messages import LocalOpen, SessionOpened
from peerd.local.passes import DaemonPass, PassRequest
from peerd.local.session import DaemonSession
from peerd.protocol.errors import ContextTooLong
from peerd.protocol.span import Span
from peerd.trio_tools import open_tasks

if TYPE_CHECKING:
    import torch


class DaemonBlocks:
    """Like `peerd.client.blocks.ServedBlocks`, but through a daemon's socket. Made by `open_daemon_blocks`."""

    def __init__(self, path: Path, facts: ModelFacts, tasks: trio.Nursery) -> None:
        self.facts = facts
        self._path = path
        self._tasks = tasks

    def __repr__(self) -> str:
        return f"<DaemonBlocks {self.facts.name} {self.facts.digest.hex()[:8]} {self._path}>"

    async def start_session(
        self,
        *,
        max_length: int,
        max_rows: int = 1,
        max_rollback: int = 0,
        prompt_length: int = 0,
        blocks: Span | None = None,
        adapter: LoraAdapter | None = None,
    ) -> DaemonSession:
        """Open a session and its chain; the caller must `close` it.

        `adapter` is the caller's own, for this session. Raises NoChain, Overloaded, ContextTooLong, InvalidRequest,
        ConnectionLost.
        """
        check_session_size(self.facts, max_length, max_rows)
        blocks = blocks or Span(0, self.facts.block_count)
        wanted = LocalOpen(
            self.facts.digest.hex(),
            max_length,
            max_rows,
            max_rollback,
            prompt_length,
            start=blocks.start,
            end=blocks.end,
        )
        session = DaemonSession(self._path, wanted, _parameters(adapter), self.facts.width)
        await self._tasks.start(session.run)
        return session

    async def forward(
        self,
        inputs: torch.Tensor,
        *,
        rows: Sequence[int],
        blocks: Span | None = None,
        prompts: torch.Tensor | None = None,
        lora: LoraPairs | None = None,
        lora_scaling: float = 1.0,
        prefixes: Prefixes | None = None,
        keep: bool = True,
    ) -> DaemonPass:
        """Like `ServedBlocks.forward`, for hidden states `[sum of rows, width]`. Raises the same errors."""
        if max(rows) > self.facts.max_length:
            raise ContextTooLong(
                f"a row of {max(rows)} positions, {self.facts.name} takes {self.facts.max_length}: shorten it"
            )
        blocks = blocks or Span(0, self.facts.block_count)
        trained = Trained(prompts, lora or {}, lora_scaling, prefixes or {})
        trained.check(blocks, rows, self.facts.width)
        wanted = LocalOpen(self.facts.digest.hex(), start=blocks.start, end=blocks.end)
        done = DaemonPass(self._path, wanted, PassRequest(inputs, tuple(rows), blocks, trained, keep))
        await self._tasks.start(done.run)
        return done


@asynccontextmanager
async def open_daemon_blocks(path: Path, facts: ModelFacts) -> AsyncIterator[DaemonBlocks]:
    """Open the blocks of the model `facts` through the daemon whose socket is `path`, until the block ends.

    Raises InvalidRequest if no daemon listens there, or if the daemon was not given this model.
    """
    async with open_channel(path) as channel:
        await channel.open(LocalOpen(facts.digest.hex()), {})
        await channel.receive(SessionOpened)
    async with open_tasks() as tasks:
        yield DaemonBlocks(path, facts, tasks)


def _parameters(adapter: LoraAdapter | None) -> Parameters:
    found: dict[tuple[int, str], torch.Tensor] = {}
    for (block, name), pair in (adapter.weights if adapter is not None else {}).items():
        if isinstance(pair, DeepPrompt):
            found[block, name] = pair.values.float()
            continue
        found[block, name + LORA_A] = pair.a.float()
        found[block, name + LORA_B] = pair.b.float() * pair.scale
    return found
