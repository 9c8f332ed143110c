"""`peerd manifest`: prints the digests of a model's blocks, for clients to pin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import trio

from peerd.cli.console import working, write

if TYPE_CHECKING:
    from peerd.compute.checkpoint.checkpoint import Checkpoint
    from peerd.routing.chains.rules import Manifest


async def print_manifest(model: Path | str) -> None:
    """Print the manifest of a checkpoint. Raises CheckpointError."""
    with working("reading weights"):
        made = await trio.to_thread.run_sync(_manifest_of, model)
    write(made.to_json())


def _manifest_of(model: Path | str) -> Manifest:
    from peerd.compute.checkpoint.opening import open_checkpoint

    with open_checkpoint(model) as checkpoint:
        return make_manifest(checkpoint)


def make_manifest(checkpoint: Checkpoint) -> Manifest:
    """The digests of a model and of each of its blocks. Raises CheckpointError."""
    from peerd.routing.chains.rules import Manifest

    blocks = tuple(checkpoint.block_digest(block) for block in range(checkpoint.block_count))
    return Manifest(checkpoint.model_digest, blocks)
