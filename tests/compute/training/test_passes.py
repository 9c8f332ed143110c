"""Training passes equal autograd on the whole Transformers model, however rows, blocks and memory are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peerd.compute.adapters.lora import LoraPair
from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.engine import Engine
from peerd.compute.errors import InvalidStepError, NonFiniteError
from peerd.compute.model.span_model import load_span
from peerd.compute.training.memory import KeptBytes, PassMemory, PassTooLargeError
from peerd.compute.training.pass_input import PassInput
from peerd.compute.training.passes import PassRunner
from peerd.compute.training.tunables import Tunables, linear_widths
from peerd.protocol.span import Span
from tests.compute.device_turns import device_turns

FAMILIES = ("llama", "gemma2", "bloom", "mixtral", "gpt_oss")
CUT = (Span(0, 3), Span(3, 7), Span(7, 8))
WIDTH = 32
# Longer than the tiny models' windows.
ROWS = (24, 7, 24, 20)
PROMPT_POSITIONS = 3
RANK = 2
SCALING = 1.5
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
ROOM = 2**26


@dataclass
class Whole:
    """A whole tiny model: what autograd says of it is what passes must say."""

    checkpoint: Checkpoint
    layers: Sequence[nn.Module]
    decoder: Any
    norm: nn.Module

    def run(self, row: torch.Tensor, tunables: Tunables, number: int) -> torch.Tensor:
        """One row `[n, WIDTH]` from the first block's input to the last one's output, with tunables hung on."""
        seen: list[torch.Tensor] = []
        handles = [
            self.layers[0].register_forward_pre_hook(lambda _, args: (row[None], *args[1:])),
            self.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])),
        ]
        for (block, name), tensor in tunables.tensors.items():
            layer = self.layers[block]
            if name == "prompt":
                own = tensor[number if len(tensor) > 1 else 0]
                handles.append(layer.register_forward_pre_hook(adding_prompt(own)))
            elif name.endswith(".lora_A"):
                other = tunables.tensors[block, name[:-1] + "B"]
                module = layer.get_submodule(name.removesuffix(".lora_A"))
                handles.append(module.register_forward_hook(adding_delta(tensor, other, tunables.scaling)))
        try:
            self.decoder(input_ids=torch.zeros(1, len(row), dtype=torch.long), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return seen[0]


def adding_prompt(prompt: torch.Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        hidden = args[0]
        padded = torch.cat((prompt, torch.zeros(hidden.shape[1] - len(prompt), WIDTH)))
        return (hidden + padded, *args[1:])

    return hook


def adding_delta(down: torch.Tensor, up: torch.Tensor, scaling: float) -> Callable[..., Any]:
    return lambda _, args, output: output + scaling * args[0] @ down.T @ up.T


def open_whole(folder: Path) -> Whole:
    checkpoint = open_checkpoint(folder)
    family = checkpoint.family
    model = family.causal_type().from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    model.requires_grad_(False)
    decoder = model.base_model
    return Whole(checkpoint, getattr(decoder, family.layers), decoder, getattr(decoder, family.norm))


@pytest.fixture(scope="module", params=FAMILIES)
def whole(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Iterator[Whole]:
    found = open_whole(tiny_checkpoint(request.param))
    with found.checkpoint:
        yield found


@pytest.fixture(scope="module")
def llama(tiny_checkpoint: Callable[[str], Path]) -> Iterator[Whole]:
    found = open_whole(tiny_checkpoint("llama"))
    with found.checkpoint:
        yield found


def passes_of(whole: Whole, span: Span, room: int = ROOM) -> PassRunner:
    model = load_span(whole.checkpoint, span, dtype=torch.float32, attention=register_attention())
    runner = Engine(model, kv_tokens=64, pass_bytes=room).passes
    assert runner is not None
    runner.measure()
    return runner


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tunables_of(whole: Whole, blocks: Span, prompts: int) -> Tunables:
    """A prompt and two LoRA pairs for each block; `prompts` is 1 or one for each row."""
    tensors: dict[tuple[int, str], torch.Tensor] = {}
    for block in range(blocks.start, blocks.end):
        tensors[block, "prompt"] = 0.3 * random(prompts, PROMPT_POSITIONS, WIDTH, seed=block)
        names = sorted(name for name in linear_widths(whole.layers[block]) if "router" not in name)
        for name in (names[0], names[-1]):
            wide_in, wide_out = linear_widths(whole.layers[block])[name]
            tensors[block, f"{name}.lora_A"] = 0.3 * random(RANK, wide_in, seed=block + 1)
            tensors[block, f"{name}.lora_B"] = 0.3 * random(wide_out, RANK, seed=block + 2)
    return Tunables(tensors, SCALING)


def part_of(tunables: Tunables, blocks: Span) -> Tunables:
    own = {key: tensor for key, tensor in tunables.tensors.items() if blocks.start <= key[0] < blocks.end}
    return Tunables(own, tunables.scaling)


@dataclass
class Outcome:
    output: torch.Tensor
    grad: torch.Tensor
    gradients: dict[tuple[int, str], torch.Tensor]


def by_autograd(whole: Whole, hidden: torch.Tensor, grad: torch.Tensor, tunables: Tunables) -> Outcome:
    """The reference: one row at a time through the whole model."""
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in tunables.tensors.items()}
    inputs = hidden.clone().requires_grad_()
    rows = torch.split(inputs, ROWS)
    output = torch.cat([whole.run(row, Tunables(leaves, SCALING), number) for number, row in enumerate(rows)])
    output.backward(grad)
    return Outcome(output.detach(), inputs.grad, {key: leaf.grad for key, leaf in leaves.items()})


def by_passes(
    runners: Sequence[PassRunner],
    hidden: torch.Tensor,
    grad: torch.Tensor,
    tunables: Tunables,
    tape_bytes: int,
    rows: tuple[int, ...] = ROWS,
) -> Outcome:
    """The same through a chain of spans, each of which may keep so many bytes between forward and backward."""
    forwards = []
    for runner in runners:
        given = PassInput(runner.whole.span, rows, hidden, part_of(tunables, runner.whole.span))
        work = runner.forward(given, runner.plan(given), tape_bytes)
        device_turns([work])
        forwards.append((given, work))
        hidden = work.output
    gradients: dict[tuple[int, str], torch.Tensor] = {}
    for runner, (given, work) in zip(reversed(runners), reversed(forwards), strict=True):
        if work.tape is not None:
            backward = runner.backward_of(work.tape, grad)
        else:
            backward = runner.backward(given, runner.plan(given), grad)
        device_turns([backward])
        gradients |= backward.gradients
        grad = backward.grad
    return Outcome(hidden, grad, gradients)


def assert_same(found: Outcome, expected: Outcome) -> None:
    torch.testing.assert_close(found.output, expected.output, **TOLERANCE)
    assert_close_to_its_size(found.grad, expected.grad)
    assert set(found.gradients) == set(expected.gradients)
    for key, gradient in expected.gradients.items():
        assert_close_to_its_size(found.gradients[key], gradient)


def assert_close_to_its_size(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-4 of the largest value: gradients here are sums of terms of size 10 to 100 that nearly cancel."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found / scale, expected / scale, **TOLERANCE)


@pytest.mark.parametrize("prompts", [1, len(ROWS)], ids=["a shared prompt", "a prompt a row"])
def test_chained_passes_equal_autograd_on_the_whole_model(whole: Whole, prompts: int):
    hidden, grad = random(sum(ROWS), WIDTH, seed=1), random(sum(ROWS), WIDTH, seed=2)
    tunables = tunables_of(whole, Span(0, 8), prompts)
    expected = by_autograd(whole, hidden, grad, tunables)
    runners = [passes_of(whole, span) for span in CUT]
    assert_same(by_passes(runners, hidden, grad, tunables, tape_bytes=0), expected)
    assert_same(by_passes(runners, hidden, grad, tunables, tape_bytes=ROOM), expected)


def test_little_memory_means_smaller_micro_batches_and_the_same_results(llama: Whole):
    span, rows = Span(0, 8), (24,) * 4
    hidden, grad = random(sum(rows), WIDTH, seed=1), random(sum(rows), WIDTH, seed=2)
    given = PassInput(span, rows, hidden, tunables_of(llama, span, len(rows)))
    rich, poor = passes_of(llama, span), passes_of(llama, span)
    # Two rows fit, three do not.
    added, a_position = given.tunables.working_bytes()
    poor.memory = PassMemory(3 * (poor.cost(span).working_bytes(2, 24) + added + 2 * 24 * a_position))
    assert [len(runner.plan(given)) for runner in (rich, poor)] == [1, 2]
    ways = [(rich, ROOM), (poor, ROOM), (poor, 0)]
    whole, *others = (by_passes([runner], hidden, grad, given.tunables, room, rows) for runner, room in ways)
    for other in others:
        assert_same(other, whole)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_a_tape_never_takes_more_than_it_may_and_changes_no_result(llama: Whole, share: float):
    span = Span(0, 8)
    runner = passes_of(llama, span)
    hidden, grad = random(sum(ROWS), WIDTH, seed=1), random(sum(ROWS), WIDTH, seed=2)
    given = PassInput(span, ROWS, hidden)
    micros = runner.plan(given)
    least, most = runner.tape_bytes(given, micros)
    allowed = int(least + share * (most - least))
    forward = runner.forward(given, micros, allowed)
    device_turns([forward])
    assert forward.tape is not None
    kept = [entry.output is not None for entries in forward.tape.entries for entry in entries]
    assert least <= forward.tape.size_bytes <= allowed
    assert any(kept) is (share > 0)
    assert not all(kept)
    backward = runner.backward_of(forward.tape, grad)
    device_turns([backward])
    assert_close_to_its_size(backward.grad, by_autograd(llama, hidden, grad, Tunables()).grad)


def test_a_tape_is_charged_for_its_copies_of_what_the_client_trains(llama: Whole):
    span = Span(0, 8)
    runner, hidden, rows = passes_of(llama, span), random(3, WIDTH, seed=1), (3,)
    bare, own = (PassInput(span, rows, hidden, tunables) for tunables in (Tunables(), tunables_of(llama, span, 1)))
    (before, _), (least, _) = (runner.tape_bytes(given, runner.plan(given)) for given in (bare, own))
    forwards = [runner.forward(own, runner.plan(own), allowed) for allowed in (least - 1, least)]
    device_turns(forwards)
    assert forwards[0].tape is None
    assert forwards[1].tape is not None
    leaves = [leaf for block in forwards[1].tape.leaves.values() for leaf in block.named().values()]
    assert forwards[1].tape.size_bytes == before + sum(leaf.nbytes for leaf in leaves)
    assert sum(leaf.nbytes for leaf in leaves) > before


def test_a_pass_over_some_blocks_of_a_span_runs_those(llama: Whole):
    whole, inner = passes_of(llama, Span(0, 8)), passes_of(llama, Span(2, 5))
    hidden = random(12, WIDTH)
    found = []
    for runner in (whole, inner):
        given = PassInput(Span(2, 5), (12,), hidden, tunables_of(llama, Span(2, 5), 1))
        work = runner.forward(given, runner.plan(given))
        device_turns([work])
        found.append(work.output)
    torch.testing.assert_close(*found, **TOLERANCE)


def test_a_row_is_not_changed_by_longer_ones_beside_it(tiny_checkpoint: Callable[[str], Path]):
    """Not even where the rotary embeddings scale with length: beyond 32 positions, in this model."""
    whole = open_whole(tiny_checkpoint("phi3_longrope"))
    with whole.checkpoint:
        runner = passes_of(whole, Span(0, 8))
    rows = (30, 36)
    hidden = random(sum(rows), WIDTH)
    together = PassInput(Span(0, 8), rows, hidden)
    assert len(runner.plan(together)) == 1
    both = runner.forward(together, runner.plan(together))
    alone = PassInput(Span(0, 8), rows[:1], hidden[:30])
    one = runner.forward(alone, runner.plan(alone))
    device_turns([both, one])
    torch.testing.assert_close(both.output[:30], one.output, **TOLERANCE)


def test_a_row_that_cannot_fit_is_refused_with_the_numbers(llama: Whole):
    span = Span(0, 8)
    runner = passes_of(llama, span)
    needed = runner.cost(span).working_bytes(1, 24)
    given = PassInput(span, ROWS, random(sum(ROWS), WIDTH))
    runner.memory = PassMemory(3 * needed - 1)
    with pytest.raises(PassTooLargeError, match=f"24 positions takes {needed} bytes .* 0:8; {needed - 1} are set"):
        runner.plan(given)
    runner.memory = PassMemory(3 * needed)
    runner.plan(given)


def test_a_high_rank_counts_like_the_activations_that_it_makes(llama: Whole):
    span, rows = Span(0, 8), (24,) * 4
    runner = passes_of(llama, span)
    plain = PassInput(span, rows, random(sum(rows), WIDTH, seed=1))
    runner.memory = PassMemory(3 * runner.cost(span).working_bytes(4, 24) + 3 * 2**20)
    assert len(runner.plan(plain)) == 1
    pair = {(0, "mlp.up_proj.lora_A"): torch.zeros(1024, WIDTH), (0, "mlp.up_proj.lora_B"): torch.zeros(48, 1024)}
    heavy = PassInput(span, rows, plain.hidden, Tunables(pair))
    assert len(runner.plan(heavy)) > 1
    once, a_position = heavy.tunables.working_bytes()
    assert once >= 2 * 4 * 1024 * (WIDTH + 48)
    assert a_position >= 2 * 4 * 1024


@pytest.mark.parametrize("length", [20, 48, 100])
def test_what_autograd_keeps_was_foreseen(whole: Whole, length: int):
    runner = passes_of(whole, Span(0, 8))
    for block in range(8):
        foreseen = runner.cost(Span(block, block + 1)).blocks[0].kept_bytes(3, length)
        given = PassInput(Span(block, block + 1), (length,) * 3, random(3 * length, WIDTH))
        with KeptBytes([*runner.whole.parameters(), *runner.whole.buffers()]) as kept:
            work = runner.forward(given, runner.plan(given), ROOM)
            device_turns([work])
        assert work.tape is not None
        assert 0.5 * foreseen <= kept.total <= foreseen


def test_values_that_are_not_finite_are_an_error(llama: Whole):
    runner = passes_of(llama, Span(0, 3))
    given = PassInput(Span(0, 3), (4,), torch.full((4, WIDTH), torch.inf))
    with pytest.raises(NonFiniteError):
        device_turns([runner.forward(given, runner.plan(given))])


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({(5, "prompt"): (1, 2, WIDTH)}, "block 5"),
        ({(0, "prompt"): (1, 9, WIDTH)}, "9 positions, a row only 8"),
        ({(0, "prompt"): (3, 2, WIDTH)}, "prompt of block 0"),
        ({(0, "prompt"): (1, 2, WIDTH + 1)}, "prompt of block 0"),
        ({(0, "no.such.lora_A"): (2, WIDTH)}, "LoRA goes beside mlp.down_proj"),
        ({(0, "mlp.up_proj.lora_A"): (2, WIDTH)}, "mlp.up_proj needs a matrix"),
        ({(0, "mlp.up_proj.lora_A"): (2, 5), (0, "mlp.up_proj.lora_B"): (48, 2)}, r"not \[2, 32\]"),
        ({(0, "mlp.up_proj.lora_A"): (2, 32), (0, "mlp.up_proj.lora_B"): (48, 3)}, r"not \[3, 32\]"),
    ],
)
def test_tunables_that_do_not_fit_are_refused_by_name(llama: Whole, tensors: dict[Any, Any], complaint: str):
    runner = passes_of(llama, Span(0, 3))
    tunables = Tunables({key: torch.zeros(shape) for key, shape in tensors.items()})
    with pytest.raises(InvalidStepError, match=complaint):
        runner.plan(PassInput(Span(0, 3), (8, 8), torch.zeros(16, WIDTH), tunables))


def test_an_adapter_of_the_engine_acts_as_the_same_pairs_of_a_client_do(llama: Whole):
    span = Span(0, 3)
    model = load_span(llama.checkpoint, span, dtype=torch.float32, attention=register_attention())
    engine = Engine(model, kv_tokens=64, pass_bytes=ROOM)
    down, up = random(RANK, WIDTH, seed=1), random(48, RANK, seed=2)
    engine.load_adapter("poet", {(1, "mlp.up_proj"): LoraPair(down, up, SCALING)})
    runner = engine.passes
    assert runner is not None
    runner.measure()
    own = Tunables({(1, "mlp.up_proj.lora_A"): down, (1, "mlp.up_proj.lora_B"): up}, SCALING)
    hidden, grad = random(12, WIDTH, seed=3), random(12, WIDTH, seed=4)
    found = []
    for given in (
        PassInput(span, (12,), hidden, adapter="poet"),
        PassInput(span, (12,), hidden, own),
        PassInput(span, (12,), hidden),
    ):
        forward = runner.forward(given, runner.plan(given), ROOM)
        device_turns([forward])
        assert forward.tape is not None
        backward = runner.backward_of(forward.tape, grad)
        device_turns([backward])
        found.append((forward.output, backward.grad))
    torch.testing.assert_close(found[0], found[1], **TOLERANCE)
    assert not torch.allclose(found[0][1], found[2][1], rtol=1e-2)
    with pytest.raises(InvalidStepError, match="no adapter 'nobody'"):
        runner.plan(PassInput(span, (12,), hidden, adapter="nobody"))
    late = PassInput(span, (12,), hidden, adapter="poet")
    work = runner.forward(late, runner.plan(late))
    assert not work.turn()
    engine.unload_adapter("poet")
    with pytest.raises(InvalidStepError, match="no longer here"):
        device_turns([work])
