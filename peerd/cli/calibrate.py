"""`peerd calibrate`: prints how far apart honest servers of a model are, for `--audit-limits`."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from peerd.cli.console import Working, working, write
from peerd.protocol.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

    from peerd.compute.checkpoint.checkpoint import Checkpoint
    from peerd.protocol.span import Span

# Texts in one batch, and their length: a prompt and an answer.
ROWS = 6
LENGTH = 96


async def print_thresholds(model: Path | str, text: Path) -> None:
    """Print the table for a checkpoint. Raises CheckpointError; InvalidRequest if the text is too short, or no text."""
    with working("reading the model") as display:
        made = await trio.to_thread.run_sync(_calibrate, model, text, display)
    write(made)


def _calibrate(model: Path | str, text: Path, display: Working) -> str:
    from peerd.compute.audits.calibrate import MARGIN, PROMPT, classes_of, measure, thresholds
    from peerd.compute.audits.distance import MIN_POSITIONS, QUANTILE
    from peerd.compute.checkpoint.opening import open_checkpoint

    with open_checkpoint(model) as checkpoint:
        inputs, words = embedded(checkpoint, [text], ROWS, LENGTH)
        spans = thirds(checkpoint.block_count)
        classes = classes_of(checkpoint)
        total = len(classes) * len(spans)
        runs = iter(range(1, total + 1))

        def on_span(numerics: object, span: object) -> None:
            display.update(f"{next(runs)} of {total}: {numerics} over blocks {span}")

        found = measure(checkpoint, inputs, spans, classes, on_span)
        return thresholds(
            found,
            how(checkpoint, words, inputs, spans)
            | {"margin": MARGIN, "prompt": PROMPT, "least_positions": MIN_POSITIONS, "quantile": QUANTILE},
        ).to_json()


def embedded(checkpoint: Checkpoint, texts: list[Path], rows: int, length: int) -> tuple[torch.Tensor, str]:
    """The embeddings of some texts' first tokens, `[rows, length, width]`, and the sha256 of the texts."""
    import torch

    from peerd.compute.checkpoint.tokenizer import load_tokenizer
    from peerd.compute.model.head import load_head

    words = "".join(_read(text) for text in texts)
    ids = load_tokenizer(checkpoint).encode(words)
    if len(ids) < rows * length:
        raise InvalidRequest(f"{texts[0]} has {len(ids)} tokens; calibration needs {rows * length}: give a longer text")
    head = load_head(checkpoint)
    positions = torch.arange(length)
    parts = [torch.tensor(ids[row * length : (row + 1) * length]) for row in range(rows)]
    hidden = torch.stack([head.embed(part, positions).float() for part in parts])
    return hidden, hashlib.sha256(words.encode()).hexdigest()


def _read(text: Path) -> str:
    try:
        return text.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise InvalidRequest(f"{text} cannot be read as UTF-8 text: {error}") from None


def thirds(blocks: int) -> list[Span]:
    """A model's blocks, cut into three spans, or as many as it has blocks."""
    from peerd.protocol.span import Span

    borders = sorted({round(blocks * part / 3) for part in range(4)})
    return [Span(start, end) for start, end in pairwise(borders)]


def how(checkpoint: Checkpoint, words: str, inputs: torch.Tensor, spans: list[Span]) -> dict[str, Any]:
    """How a table was made."""
    import torch

    return {
        "model": checkpoint.name,
        "model_digest": checkpoint.model_digest.hex(),
        "wire_dtype": str(checkpoint.dtype).removeprefix("torch."),
        "text_sha256": words,
        "rows": len(inputs),
        "positions": inputs.shape[1],
        "spans": [str(span) for span in spans],
        "machine": platform.machine(),
        "device": "cpu",
        "torch": torch.__version__,
        "peerd": version("peerd"),
    }
