"""Measures the blocks on a GPU: their speed beside Transformers' own layers, and beside what its memory allows.

    python -m benchmarks.compute.gpu_bench                      # all, on cuda:0: some 15 minutes
    python -m benchmarks.compute.gpu_bench --part blocks        # a table of tokens/s a block: below 10 minutes
    python -m benchmarks.compute.gpu_bench --part swarm         # BLOOM-176B in nf4 behind three peers: below 10 minutes
    python -m benchmarks.compute.gpu_bench --tiny --device cpu  # the whole script at toy sizes, without a GPU

Before the first run on a machine: a CUDA build of torch 2.13, which brings Triton, and `pip install -e . --group dev`.
Where nothing can be installed, `blocks` needs no more than torch, Triton, transformers, bitsandbytes (for nf4), numpy,
platformdirs and gguf, in a folder like the one that `.ci/check-rooms` lays out in `.cache/rooms`; `swarm` needs trio,
trio-websocket, cryptography, msgpack and kademlia too, all small wheels; tests need pytest and trio. Then check first,
in a minute or two, that kernels, graphs and copies work there:

    pytest tests/compute/test_cuda.py tests/compute/attention/test_paged.py \\
        tests/compute/engine/test_paged_engine.py tests/compute/quantized/test_kernel.py

No checkpoint is needed: weights are random, made on the GPU. As of this line nobody has run this on a GPU: durations
and memory are worked out, not measured.

Memory: `blocks` holds four blocks at a time twice (ours, Transformers') with 32 rows of KV: BLOOM in bf16 takes 20 GB
each, with 2 x 15 GB of KV. `swarm` holds all 70 blocks in nf4 with one fp32 scale for 64 values: 97 GB, and 17 GB of
KV. A GPU with 139 GiB has room for all blocks. With 80 GiB, choose fewer by `--blocks`.

Every figure is a median of turns; each waits until the GPU is done. "Limit" is the time for reading the weights and the
KV cache once, at the speed at which this GPU copies (bytes read plus written). A faster result would be a mistake.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.compute.random_checkpoint import random_checkpoint
from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.engine.engine import Engine
from peerd.compute.model.span_model import SpanModel, load_span
from peerd.compute.steps import EngineStep
from peerd.protocol.encoding.tensors import DTYPE_NAMES
from peerd.protocol.rows import RowSlice, SessionSize
from peerd.protocol.span import Span

NO_GPU = 3


@dataclass(frozen=True)
class Sizes:
    """What to measure: models' blocks, contexts and batches."""

    models: tuple[str, ...]
    swarm_model: str
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    formats: tuple[str, ...]
    blocks: int
    turns: int
    copied_bytes: int
    dtype: torch.dtype


FULL = Sizes(
    ("llama-3-70b", "bloom-176b"), "bloom-176b", (1, 8, 32), (128, 2048), ("none", "int8", "nf4"), 4, 20, 4 << 30,
    torch.bfloat16,
)  # fmt: skip
TINY = Sizes(
    ("llama-tiny", "bloom-tiny"), "bloom-tiny", (1, 2), (8, 24), ("none", "int8", "nf4"), 2, 2, 1 << 24, torch.float32
)


class Clock:
    """Times work on a device, until the device is done."""

    def __init__(self, device: torch.device, turns: int) -> None:
        self.device = device
        self._turns = turns

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def median_s(self, turn: Callable[[], object]) -> float:
        """Median seconds of a turn, after two turns that do not count."""
        for _ in range(2):
            turn()
        seconds = []
        for _ in range(self._turns):
            self.wait()
            began = time.perf_counter()
            turn()
            self.wait()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def bandwidth(self, size: int) -> float:
        """Bytes a second, read and written, of a copy in the device's memory."""
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.median_s(lambda: target.copy_(source))


class Ours:
    """The engine with as many sessions as the largest batch, each with the longest context cached."""

    def __init__(self, model: SpanModel, sizes: Sizes, seed: int = 0) -> None:
        self._longest, self._most = max(sizes.contexts), max(sizes.batches)
        # Each session gets whole pages, with room for more positions.
        each = self._longest + 32
        self.engine = Engine(model, kv_tokens=self._most * each, batch_tokens=2048)
        self.engine.warm_up()
        generator = torch.Generator().manual_seed(seed)
        self._hidden = torch.randn(self._longest, model.hidden_size, generator=generator).to(model.dtype)
        for session in range(self._most):
            self.engine.open(session, SessionSize(each - 16, max_rollback=self._longest))
        began = time.perf_counter()
        for session in range(self._most):
            self._submit(session, 0, self._hidden)
        self._run()
        self.prefill_s = time.perf_counter() - began

    def turn(self, batch: int, context: int) -> None:
        """Compute one more position after `context` for `batch` sessions. Positions after `context` are rolled back
        first.
        """
        for session in range(batch):
            self._submit(session, context - 1, self._hidden[:1])
        self._run()

    def _submit(self, session: int, start: int, hidden: torch.Tensor) -> None:
        self.engine.submit(EngineStep(session, 1, (), (RowSlice(0, start, len(hidden)),), hidden))

    def _run(self) -> None:
        while batch := self.engine.plan():
            for result in self.engine.collect(batch, self.engine.run(batch)):
                if result.error is not None:
                    raise result.error


def transformers_turn(model: SpanModel, batch: int, context: int) -> Callable[[], object]:
    """Return a turn of Transformers' own decoder layers with its own cache: rows of equal length in one batch."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for layer, kind in enumerate(model.kinds):
        keys, values = (
            torch.randn(batch, kind.kv_heads, context - 1, width, device=model.device, dtype=model.dtype)
            for width in (kind.key_dim, kind.value_dim)
        )
        cache.update(keys, values, layer)
    hidden = torch.randn(batch, 1, model.hidden_size, device=model.device, dtype=model.dtype)
    positions = torch.full((batch, 1), context - 1, device=model.device)

    def turn() -> None:
        with torch.inference_mode():
            model(hidden, positions, cache)
            cache.crop(-1)

    return turn


def as_transformers_quantizes(model: SpanModel, form: str) -> None:
    """Replace linear layers by bitsandbytes' own, with the settings that Transformers uses."""
    import bitsandbytes as bnb

    for name, linear in list(model.layers.named_modules()):
        if type(linear) is not torch.nn.Linear:
            continue
        shape: dict[str, Any] = {
            "input_features": linear.in_features,
            "output_features": linear.out_features,
            "bias": linear.bias is not None,
        }
        layers: Any = bnb.nn
        weight = linear.weight.data
        if form == "int8":
            new: Any = layers.Linear8bitLt(**shape, has_fp16_weights=False, threshold=6.0)
            new.weight = layers.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            new = layers.Linear4bit(**shape, compute_dtype=model.dtype, quant_type="nf4")
            new.weight = layers.Params4bit(weight, requires_grad=False, quant_type="nf4")
        if linear.bias is not None:
            new.bias = linear.bias
        model.layers.set_submodule(name, new.to(model.device))
        del linear.weight


def weight_bytes(model: SpanModel) -> int:
    """Bytes of the blocks' weights as they are stored."""
    return sum(tensor.nbytes for tensor in (*model.layers.parameters(), *model.layers.buffers()))


def measure_model(name: str, form: str, sizes: Sizes, clock: Clock, bandwidth: float) -> list[list[str]]:
    """Measure one model in one format. Returns rows of the table."""
    checkpoint = random_checkpoint(name, clock.device, sizes.dtype)
    span = Span(0, sizes.blocks)
    cells = [(batch, context) for context in sorted(sizes.contexts, reverse=True) for batch in sizes.batches]
    model = load_span(
        checkpoint, span, device=clock.device, dtype=sizes.dtype, attention=register_attention(), quantize=form
    )
    stored, kv = weight_bytes(model) / len(span), model.kinds[0].values_per_token * sizes.dtype.itemsize
    ours = Ours(model, sizes)
    prefilled = max(sizes.batches) * max(sizes.contexts)
    say(
        f"{name} {form}: {prefilled} positions prefilled, {prefilled / ours.prefill_s * len(span):.0f} a second a block"
    )
    own_s = {cell: clock.median_s(partial(ours.turn, *cell)) / len(span) for cell in cells}
    del ours, model
    their_s = transformers_times(checkpoint, span, form, clock, sizes, cells)
    rows = []
    for batch, context in sorted(cells):
        limit_s = (stored + batch * context * kv) / bandwidth
        own, theirs = own_s[batch, context], their_s.get((batch, context))
        rows.append(
            [
                *(name, DTYPE_NAMES[sizes.dtype] if form == "none" else form, str(batch), str(context)),
                *(f"{batch / own:.0f}", "-" if theirs is None else f"{batch / theirs:.0f}"),
                *(f"{batch / limit_s:.0f}", f"{limit_s / own:.2f}"),
            ]
        )
        say(" | ".join(rows[-1]))
    return rows


def transformers_times(
    checkpoint: Checkpoint, span: Span, form: str, clock: Clock, sizes: Sizes, cells: list[tuple[int, int]]
) -> dict[tuple[int, int], float]:
    """Seconds for one block by Transformers. Leaves out, and logs, what it cannot do here."""
    try:
        model = load_span(checkpoint, span, device=clock.device, dtype=sizes.dtype)
        if form != "none":
            as_transformers_quantizes(model, form)
        return {cell: clock.median_s(transformers_turn(model, *cell)) / len(span) for cell in cells}
    except (RuntimeError, ValueError, AttributeError, ImportError) as error:
        say(f"Transformers' own layers did not run: {error}")
        return {}


def say(text: str) -> None:
    """Log progress to standard error; the table goes to standard output."""
    print(text, file=sys.stderr, flush=True)


def facts(device: torch.device, bandwidth: float) -> list[str]:
    """Describe the machine and versions that the figures belong to."""
    packages = ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "transformers", "bitsandbytes"))
    where = platform.processor() or platform.machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        where = f"{properties.name}, {memory}, CUDA {torch.version.cuda}"
    return [f"- {where}; {packages}", f"- memory moves {bandwidth / 1e9:.0f} GB/s (a copy, read and written)"]


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        return "none"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Format the rows as Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def blocks_part(sizes: Sizes, device: torch.device) -> list[str]:
    clock = Clock(device, sizes.turns)
    bandwidth = clock.bandwidth(sizes.copied_bytes)
    rows = [
        row
        for name in sizes.models
        for form in sizes.formats
        for row in measure_model(name, form, sizes, clock, bandwidth)
    ]
    head = ["model", "format", "batch", "context", "peerd", "Transformers", "limit", "share of limit"]
    title = f"## Decoding, tokens/s a block ({sizes.blocks} blocks, random weights)"
    return [title, "", *facts(device, bandwidth), "", *table(head, rows), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "blocks", "swarm"), default="all")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the script itself")
    parser.add_argument("--blocks", type=int, help="blocks of the swarm's model; default: all")
    parser.add_argument("--output", type=Path, help="write the tables here too")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        say(f"there is no GPU here: torch {torch.__version__} finds none; `--tiny --device cpu` tries the script alone")
        sys.exit(NO_GPU)
    sizes = TINY if chosen.tiny else FULL
    lines = ["# peerd on one GPU" if device.type == "cuda" else "# peerd, toy sizes without a GPU", ""]
    if chosen.part in ("all", "blocks"):
        lines += blocks_part(sizes, device)
    if chosen.part in ("all", "swarm"):
        from benchmarks.compute.gpu_swarm import swarm_part

        lines += swarm_part(sizes.swarm_model, device, sizes.dtype, tiny=chosen.tiny, blocks=chosen.blocks)
    text = "\n".join(lines)
    print(text)
    if chosen.output:
        chosen.output.write_text(text)


if __name__ == "__main__":
    main()
