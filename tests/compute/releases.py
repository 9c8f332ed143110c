"""Compares what two releases of Transformers compute with the same weights: peers with either meet in one swarm.

    python -m tests.compute.releases write FOLDER    saves a tiny model of every family, with its logits
    python -m tests.compute.releases check FOLDER    compares them with those of this Python's Transformers

A family that a release lacks, or refuses by name, is listed. One that computes something else fails the check: it needs
`since` in its row of the table of families. `make test-oldest` and `make test-newest` run it against `.venv`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import __version__

from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import CheckpointError
from peerd.compute.families.lookup import FAMILIES
from peerd.compute.model.head import load_head
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span
from tests.compute.tiny_families import VARIANTS, tiny_model

# Of the logits' norm. Releases that add in another order differ by some 1e-7.
MOST = 1e-5
TOKENS = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(0))


def logits_of(folder: Path) -> torch.Tensor:
    """What peerd computes with the checkpoint: head and blocks, without a cache. Raises CheckpointError."""
    with open_checkpoint(folder) as checkpoint:
        head = load_head(checkpoint)
        span = load_span(checkpoint, Span(0, checkpoint.block_count), attention="eager")
    with torch.no_grad():
        return head.logits(span.forward_no_cache(head.embed(TOKENS)[None])[0])


def write(target: Path) -> None:
    for name in (*sorted(FAMILIES), *VARIANTS):
        family, fields = VARIANTS.get(name, (name, None))
        folder = target / name
        try:
            tiny_model(FAMILIES[family], fields).save_pretrained(folder)
            torch.save(logits_of(folder), folder / "logits.pt")
        except CheckpointError as error:
            print(f"left out: {name}: {error}")


def check(source: Path) -> int:
    """Print what is compared, and return how many families compute something else."""
    wrong = 0
    for folder in sorted(path.parent for path in source.glob("*/logits.pt")):
        expected = torch.load(folder / "logits.pt")
        try:
            off = float((logits_of(folder) - expected).norm() / expected.norm())
        except CheckpointError as error:
            print(f"refused: {folder.name}: {error}")
            continue
        if off > MOST:
            print(f"DIFFERENT: {folder.name}, by {off:.1e}")
            wrong += 1
    print(f"Transformers {__version__}: {wrong} families compute something else")
    return wrong


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", folder]:
            write(Path(folder))
        case ["check", folder]:
            sys.exit(bool(check(Path(folder))))
        case _:
            sys.exit(__doc__)
