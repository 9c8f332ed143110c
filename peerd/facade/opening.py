"""Opens a peer and a model's blocks for the facade, inside the bridge's loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from peerd.client.blocks import ServedBlocks
from peerd.peer import open_peer

if TYPE_CHECKING:
    from peerd.compute.checkpoint.checkpoint import Checkpoint


@asynccontextmanager
async def open_swarm(
    path: Any,
    revision: str | None,
    bootstrap: Sequence[Any],
    options: Mapping[str, Any],
    on_checkpoint: Callable[[Checkpoint], None],
) -> AsyncIterator[ServedBlocks]:
    """A client of its own for one model. `options` are `open_peer`'s; `on_checkpoint` builds the head, in a thread."""
    async with (
        open_peer(bootstrap=bootstrap, **options) as peer,
        peer.blocks(path, on_checkpoint, revision=revision) as blocks,
    ):
        yield blocks
