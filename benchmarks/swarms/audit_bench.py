"""What audits find, and whom they accuse: liars, honest mixes of numerics, and the cost.

Answers and audits are put together from hidden states that SmolLM2-135M-Instruct gave in every dtype and quantization,
over the cache and as prefills, in mixed chains, and with a liar at the second of three hops (and for a skipped
block, at each). Half of the texts make the
limits, as `peerd calibrate` does; the other half are the answers.

An answer is simulated as a block bootstrap: windows of 8 neighbouring positions from random places of random texts, 16
to 64 positions together. Checks of single hops compare sketches of what a hop sent and of what another server made of
the same input, under random seeds. So a hundred thousand simulated answers say how often chance puts bad windows
together, and little about texts and models that were not computed: of those there are as many as --rows. Everything
that is random follows from --seed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from random import Random

import torch
from torch import nn

from benchmarks.quality import TEXT
from peerd.cli.calibrate import LENGTH, ROWS, embedded, thirds
from peerd.compute.attention.attention import register_attention
from peerd.compute.audits.calibrate import BATCH, CLASSES, Measured, decode, measure, prefill, thresholds
from peerd.compute.audits.distance import FIRST_POSITION, QUANTILE, distance
from peerd.compute.audits.sketches import Sketcher, sketched_limit
from peerd.compute.audits.thresholds import Numerics, Thresholds
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.engine import Engine
from peerd.compute.kv.layout import PAGE_TOKENS
from peerd.compute.model.span_model import SpanModel, load_span
from peerd.protocol.messages.audits import SEED_BYTES, SKETCH_SIZE
from peerd.protocol.span import Span

WINDOW = 8
LENGTHS = (16, 32, 64)
PROBABILITY = 1 / 64
BF16, NF4, INT8 = (Numerics("bfloat16", quantization) for quantization in ("none", "nf4", "int8"))
FULL = Numerics("float32", "none")
MIXES = 3
# Under so many seeds each pair of results is sketched.
SEEDS = 8


@dataclass(frozen=True)
class Lie:
    """What a liar announces, loads and sends."""

    name: str
    announced: Numerics
    loads: Numerics
    spoil: Callable[[SpanModel], None] = lambda model: None
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda inputs, output: output
    hops: tuple[int, ...] = (1,)


def skip_a_block(model: SpanModel) -> None:
    """Make the middle block add nothing."""
    layer = model.layers[len(model.layers) // 2]
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Module)
        with torch.no_grad():
            linear.get_parameter("weight").zero_()


def other_weights(model: SpanModel) -> None:
    """Random weights of the same size as the model's."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            if parameter.dim() > 1:
                values = torch.randn(parameter.shape, generator=generator) * parameter.float().std()
                parameter.copy_(values.to(parameter.dtype))


def noise(inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """One hundredth of what the blocks added, in a random direction, at each position."""
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(output.shape, generator=generator)
    direction /= direction.norm(dim=-1, keepdim=True)
    added: torch.Tensor = (output - inputs).norm(dim=-1, keepdim=True)
    return output + 0.01 * added * direction


LIES = (
    Lie("skips one block of ten", BF16, BF16, spoil=skip_a_block, hops=(0, 1, 2)),
    Lie("returns its input", BF16, BF16, change=lambda inputs, output: inputs),
    Lie("returns the output of the position before", BF16, BF16, change=lambda _, output: output.roll(1, 1)),
    Lie("has other weights", BF16, BF16, spoil=other_weights),
    Lie("announces bf16, has nf4", BF16, NF4),
    Lie("announces bf16, has int8", BF16, INT8),
    Lie("announces int8, has nf4", INT8, NF4),
    Lie("adds noise of 1 %, announces bf16", BF16, BF16, change=noise),
    Lie("adds noise of 1 %, announces float32", FULL, FULL, change=noise),
)


@dataclass
class World:
    """Everything that was computed."""

    found: Measured
    mixes: list[tuple[tuple[Numerics, ...], torch.Tensor]] = field(default_factory=list)
    #: By lie and hop: the chain's output, and the liar's own output for the input that honest servers get there.
    lies: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def compute(checkpoint: Checkpoint, rows: int, length: int, random: Random, say: Callable[[str], None]) -> World:
    """Run the texts through honest chains of every kind, mixed chains, and chains with a liar."""
    inputs, _ = embedded(checkpoint, [TEXT], rows, length)
    spans = thirds(checkpoint.block_count)
    world = World(measure(checkpoint, inputs, spans, on_span=lambda numerics, span: say(f"{numerics} {span}")))
    for _ in range(MIXES):
        chain = tuple(random.choice(CLASSES) for _ in spans)
        hidden = inputs
        for numerics, span in zip(chain, spans, strict=True):
            hidden = prefill(load(checkpoint, span, numerics, rows), hidden)
        world.mixes.append((chain, hidden))
        say(f"mix {' '.join(map(str, chain))}")
    for lie in LIES:
        for hop in lie.hops:
            world.lies[lie.name, hop] = run_lie(checkpoint, world.found, spans, lie, hop)
            say(f"{lie.name} {hop}")
    return world


def load(checkpoint: Checkpoint, span: Span, numerics: Numerics, rows: int, lie: Lie | None = None) -> Engine:
    """An engine over a span."""
    dtype, quantize = getattr(torch, numerics.dtype), numerics.quantization
    model = load_span(checkpoint, span, dtype=dtype, attention=register_attention(), quantize=quantize)
    if lie is not None:
        lie.spoil(model)
    return Engine(model, kv_tokens=rows * (LENGTH + PAGE_TOKENS), batch_tokens=BATCH)


def run_lie(
    checkpoint: Checkpoint, found: Measured, spans: Sequence[Span], lie: Lie, hop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A chain whose hop `hop` lies, the others honest and of the announced class; and the liar alone."""
    rows = len(found.inputs)
    before = found.whole[lie.announced, False][hop - 1] if hop else found.inputs
    liar = load(checkpoint, spans[hop], lie.loads, rows, lie)
    hidden = lie.change(before, prefill(liar, before))
    given = found.part_inputs[hop]
    alone = lie.change(given, prefill(liar, given))
    for span in spans[hop + 1 :]:
        hidden = prefill(load(checkpoint, span, lie.announced, rows), hidden)
    return hidden, alone


def relative(inputs: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """By row and position, how far apart two outputs are: what `distance` takes a quantile of."""
    added = torch.maximum((one - inputs).norm(dim=-1), (other - inputs).norm(dim=-1))
    apart: torch.Tensor = (one - other).norm(dim=-1)
    return apart / added


def simulated(errors: torch.Tensor, random: Random) -> float:
    """The distance of one simulated answer, from errors `[rows, positions]`."""
    rows, positions = errors.shape
    parts = []
    for _ in range(random.choice(LENGTHS) // WINDOW):
        row, start = random.randrange(rows), random.randrange(FIRST_POSITION, positions - WINDOW + 1)
        parts.append(errors[row, start : start + WINDOW])
    return float(torch.cat(parts).quantile(QUANTILE))


def halves(found: Measured) -> tuple[Measured, slice]:
    """What was measured on the first half of the texts, and the other half."""
    middle = len(found.inputs) // 2
    first = Measured(
        found.inputs[:middle],
        {way: [part[:middle] for part in parts] for way, parts in found.whole.items()},
        {numerics: [part[:middle] for part in parts] for numerics, parts in found.part.items()},
        [part[:middle] for part in found.part_inputs],
    )
    return first, slice(middle, None)


def limit_of(table: Thresholds, one: Sequence[Numerics], other: Sequence[Numerics]) -> float:
    """The limit for two chains of three hops over the same spans."""
    limit = table.limit(zip(one, other, strict=True), is_whole=True)
    assert limit is not None
    return limit


def false_alarms(world: World, audits: int, random: Random) -> Iterator[str]:
    """Simulate audits of honest chains by honest chains of any kind."""
    first, held = halves(world.found)
    table = thresholds(first, {})
    answers = [((numerics,) * 3, world.found.whole[numerics, True][-1]) for numerics in CLASSES] + world.mixes
    checks = [((numerics,) * 3, world.found.whole[numerics, False][-1]) for numerics in CLASSES] + world.mixes
    pairs = [
        (relative(world.found.inputs[held], one[held], other[held]), limit_of(table, made_by, checked_by))
        for made_by, one in answers
        for checked_by, other in checks
        if one is not other
    ]
    ratios = []
    for _ in range(audits):
        errors, limit = random.choice(pairs)
        ratios.append(simulated(errors, random) / limit)
    found = torch.tensor(ratios)
    alarms = int((found > 1).sum())
    texts = len(answers[0][1][held])
    windows = texts * ((world.found.inputs.shape[1] - FIRST_POSITION) // WINDOW)
    yield (
        f"{audits} simulated audits, {len(pairs)} pairs of chains: {alarms} false alarms. They are put together from"
        f" {windows} separate windows of {texts} texts; the limits come from {len(first.inputs)} others."
    )
    quantiles = [float(found.quantile(q)) for q in (0.5, 0.99, 0.9999)]
    yield (
        f"The distance as a part of its limit: median {quantiles[0]:.2f}, 99 % {quantiles[1]:.2f},"
        f" 99.99 % {quantiles[2]:.2f}, most {float(found.max()):.2f}."
    )


def liars(world: World, random: Random, draws: int = 2000) -> Iterator[str]:
    """For each lie, the class that checks, and the hop: how likely one audit finds it, and after how many sessions."""
    first, held = halves(world.found)
    table = thresholds(first, {})
    found = world.found
    checks = (BF16, FULL, INT8, NF4)
    yield f"| lie | {' | '.join(f'checked by {each}' for each in checks)} |"
    yield f"|---|{'---|' * len(checks)}"
    for lie in LIES:
        cells = []
        for checker in checks:
            shares = []
            for hop in lie.hops:
                chain, alone = world.lies[lie.name, hop]
                errors = relative(found.inputs[held], chain[held], found.whole[checker, False][-1][held])
                limit = limit_of(table, (lie.announced,) * 3, (checker,) * 3)
                seen = sum(simulated(errors, random) > limit for _ in range(draws)) / draws
                shares.append(seen * is_convicted(found, table, lie, hop, checker, alone, held))
            cells.append(" / ".join(sessions(share) for share in shares))
        yield f"| {lie.name} | {' | '.join(cells)} |"


def sketched(inputs: torch.Tensor, one: torch.Tensor, other: torch.Tensor, random: Random) -> list[torch.Tensor]:
    """As `relative`, of sketches of all three, under several seeds."""
    found = []
    for _ in range(SEEDS):
        sketch = Sketcher((random.randbytes(SEED_BYTES),), inputs.shape[-1]).sketch
        states = (torch.stack([sketch(row) for row in states]) for states in (inputs, one, other))
        found.append(relative(*states))
    return found


def hop_liars(world: World, random: Random, draws: int = 2000) -> Iterator[str]:
    """As `liars`, where the hop is checked by itself: what it sent is compared by sketches with what another server
    makes of what it was sent.
    """
    first, held = halves(world.found)
    table = thresholds(first, {})
    found = world.found
    checks = (BF16, FULL, INT8, NF4)
    yield f"| lie | {' | '.join(f'hop checked by {each}' for each in checks)} |"
    yield f"|---|{'---|' * len(checks)}"
    for lie in LIES:
        cells = []
        for checker in checks:
            shares = []
            limit = sketched_limit(part_limit(table, lie.announced, checker))
            for hop in lie.hops:
                _, alone = world.lies[lie.name, hop]
                states = found.part_inputs[hop][held], alone[held], found.part[checker][hop][held]
                errors = sketched(*states, random)
                seen = sum(simulated(random.choice(errors), random) > limit for _ in range(draws)) / draws
                shares.append(seen)
            cells.append(" / ".join(sessions(share) for share in shares))
        yield f"| {lie.name} | {' | '.join(cells)} |"


def part_limit(table: Thresholds, one: Numerics, other: Numerics) -> float:
    """The limit for two servers of the same blocks."""
    limit = table.limit([(one, other)], is_whole=False)
    assert limit is not None
    return limit


def hop_alarms(world: World, audits: int, random: Random) -> Iterator[str]:
    """Simulate checks of honest hops by honest servers: at the first hop also of what was decoded over a cache."""
    first, held = halves(world.found)
    table = thresholds(first, {})
    found = world.found
    pairs = []
    for one, other in product(CLASSES, CLASSES):
        limit = sketched_limit(part_limit(table, one, other))
        other_states = found.part[other]
        given = [found.whole[one, True][0], *(found.part[one][hop] for hop in range(1, len(other_states)))]
        for hop, left in enumerate(given):
            if hop and one == other:
                continue
            states = found.part_inputs[hop][held], left[held], other_states[hop][held]
            pairs.append((sketched(*states, random), limit))
    ratios = []
    for _ in range(audits):
        errors, limit = random.choice(pairs)
        ratios.append(simulated(random.choice(errors), random) / limit)
    ratio = torch.tensor(ratios)
    yield (
        f"{audits} simulated checks of single hops, {len(pairs)} pairs, {SEEDS} seeds each: {int((ratio > 1).sum())}"
        f" false alarms. The distance as a part of its limit: median {float(ratio.median()):.2f}, 99.99 %"
        f" {float(ratio.quantile(0.9999)):.2f}, most {float(ratio.max()):.2f}."
    )


def hop_cost(checkpoint: Checkpoint) -> Iterator[str]:
    """What sketches and the check of a hop cost."""
    inputs, _ = embedded(checkpoint, [TEXT], 1, LENGTH)
    hidden, width = inputs[0], inputs.shape[2]
    sketcher = Sketcher((bytes(SEED_BYTES),), width)
    began = time.perf_counter()
    for _ in range(1000):
        sketcher.sketch(hidden[:1])
    one = (time.perf_counter() - began) / 1000
    began = time.perf_counter()
    for _ in range(100):
        sketcher.sketch(hidden)
    many = (time.perf_counter() - began) / 100
    yield (
        f"A sketch takes {one * 1e6:.0f} us for a token and {many * 1e6:.0f} us for {LENGTH} positions, and sends"
        f" {SKETCH_SIZE * 4} bytes a position to the client, {LENGTH * SKETCH_SIZE * 4 / 1024:.0f} KiB a hop for"
        f" {LENGTH} positions."
    )
    copied = LENGTH * width * checkpoint.dtype.itemsize
    yield (
        f"The check of a hop is a prefill of its blocks, {copied / 1024:.0f} KiB between two servers, and"
        f" {LENGTH * SKETCH_SIZE * 3 * 4 / 1024:.0f} KiB of sketches to the client. With p = 1/64 for each hop it adds"
        f" {1 / 64:.1%} of the positions. A difference costs two more."
    )


def is_convicted(
    found: Measured, table: Thresholds, lie: Lie, hop: int, checker: Numerics, alone: torch.Tensor, held: slice
) -> float:
    """In which part of the texts the trial of the hop ends with the liar's conviction."""
    limit = table.limit([(lie.announced, checker)], is_whole=False)
    assert limit is not None
    given, honest = found.part_inputs[hop][held], found.part[checker][hop][held]
    kept = slice(FIRST_POSITION, None)
    told = [
        distance(x[kept], one[kept], other[kept]) > limit
        for x, one, other in zip(given, alone[held], honest, strict=True)
    ]
    return sum(told) / len(told)


def sessions(share: float) -> str:
    """After how many sessions a liar is found on average, and in 19 of 20 cases."""
    if share < 1e-3:
        return "never"
    # A geometric distribution: 3 means hold 95 % of it.
    mean = 1 / (PROBABILITY * share)
    return f"{mean:.0f} ({3 * mean:.0f})"


def cost(checkpoint: Checkpoint) -> Iterator[str]:
    """What an answer of 32 + 64 positions costs, and its audit."""
    inputs, _ = embedded(checkpoint, [TEXT], 1, LENGTH)
    spans = thirds(checkpoint.block_count)
    engines = [load(checkpoint, span, FULL, 1) for span in spans]
    seconds = []
    for run in (decode, prefill):
        best = float("inf")
        for _ in range(3):
            began, hidden = time.perf_counter(), inputs
            for engine in engines:
                hidden = run(engine, hidden)
            best = min(best, time.perf_counter() - began)
        seconds.append(best)
    width = inputs.shape[2]
    sent = LENGTH * width * checkpoint.dtype.itemsize
    back = 65 * width * checkpoint.dtype.itemsize
    yield (
        f"An answer (prompt 32, then 64 tokens) takes the blocks {seconds[0]:.2f} s, its audit as one prefill"
        f" {seconds[1]:.2f} s: with p = 1/64 audits add {seconds[1] / seconds[0] / 64:.2%} of the time and"
        f" {1 / 64:.1%} of the positions."
    )
    yield (
        f"The client sends {sent / 1024:.0f} KiB and receives {back / 1024:.0f} KiB; {len(spans) - 1} times"
        f" {sent / 1024:.0f} KiB go between servers ({checkpoint.dtype}, width {width})."
    )
    yield "A difference costs 2 x ceil(log2 hops) + 3 more prefills, each of a part of the blocks."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--audits", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a file for what was computed, which a second run takes from there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    random, began = Random(options.seed), time.monotonic()
    with open_checkpoint(demo_model_path()) as checkpoint:

        def say(what: str) -> None:
            print(f"  {time.monotonic() - began:6.0f} s  {what}", flush=True)

        if options.keep is not None and options.keep.exists():
            world = torch.load(options.keep, weights_only=False)
        else:
            world = compute(checkpoint, options.rows, LENGTH, random, say)
        if options.keep is not None:
            torch.save(world, options.keep)
        parts = (
            liars(world, random),
            hop_liars(world, random),
            false_alarms(world, options.audits, random),
            hop_alarms(world, options.audits, random),
            cost(checkpoint),
            hop_cost(checkpoint),
        )
        for part in parts:
            print()
            for line in part:
                print(line, flush=True)


if __name__ == "__main__":
    main()
