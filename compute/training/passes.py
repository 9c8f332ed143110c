"""Runs forward and backward over a span for training: no cache, frozen weights, one block at a time.

`PassRunner` makes passes for the device's thread. `turn()` runs one block of one micro-batch, so inference waits no
longer than that. A forward may leave a tape: the blocks' inputs, and the graphs of as many blocks as memory allows.
Its backward then computes again only the missing graphs; without a tape a backward starts from the input. Turns end
between blocks, so no torch mode may stay on across a `yield`, and inference tensors must never get onto a tape.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from peerd.compute.adapters.span_adapters import SpanAdapters
from peerd.compute.errors import InvalidStepError, NonFiniteError
from peerd.compute.model.span_model import SpanModel
from peerd.compute.training.memory import (
    PROBE_POSITIONS,
    GraphBytes,
    KeptBytes,
    PassMemory,
    PassTooLargeError,
    SpanCost,
    signature,
)
from peerd.compute.training.micro_batches import MicroBatch, cut_rows
from peerd.compute.training.pass_input import PassInput, PassLimits
from peerd.compute.training.tunables import BlockLeaves, with_leaves, with_prompt
from peerd.protocol.span import Span

# More positions at once make no CPU faster, and inference waits for one block of a micro-batch.
MICRO_POSITIONS = 1024


@dataclass(slots=True, eq=False)
class _Entry:
    """One block of one micro-batch: its input, and its output with the graph between if that was kept, else None."""

    hidden: torch.Tensor
    output: torch.Tensor | None


@dataclass(slots=True, eq=False)
class Tape:
    """What a forward left for its backward, on the device. `size_bytes` is an upper estimate."""

    given: PassInput
    micros: list[MicroBatch]
    leaves: dict[int, BlockLeaves]
    size_bytes: int = 0
    entries: list[list[_Entry]] = field(default_factory=list)


_GRADIENT = " as a gradient"


class TrainingWork:
    """A pass for the device's thread, which is complete when `_run` ends."""

    def __init__(self) -> None:
        self._turns = self._run()

    def turn(self) -> bool:
        """Run one block of one micro-batch. Returns whether the pass is complete. Device thread.

        Raises NonFiniteError, InvalidStepError.
        """
        for _ in self._turns:
            return False
        return True

    def _run(self) -> Generator[None, None, None]:
        raise NotImplementedError


class PassRunner:
    """Makes passes over one engine's span. `part` returns the model of some of its blocks (device thread)."""

    def __init__(
        self, whole: SpanModel, part: Callable[[Span], SpanModel], adapters: SpanAdapters, memory: PassMemory
    ) -> None:
        self.memory = memory
        self.whole = whole
        self.adapters = adapters
        #: What a pass may ask of these blocks.
        self.limits = PassLimits(whole, adapters)
        self._part = part
        self._costs: dict[int, GraphBytes] = {}
        self._largest_weight_bytes = 0

    @property
    def measured(self) -> bool:
        """Whether `measure` ran, which `plan` needs."""
        return bool(self._costs)

    def measure(self) -> None:
        """Measure the memory of each block's activations. Device thread; takes milliseconds for each kind of block."""
        known: dict[object, GraphBytes] = {}
        for index, layer in enumerate(self.whole.layers):
            block = self.whole.span.start + index
            key = signature(layer), self.whole.kinds[index]
            if key not in known:
                known[key] = GraphBytes.fitted(*((count, self._probe(block, count)) for count in PROBE_POSITIONS))
            self._costs[block] = known[key]
        sizes = [tensor.nbytes for tensor in self.whole.state_dict().values()]
        self._largest_weight_bytes = max(sizes, default=0)

    def plan(self, given: PassInput) -> list[MicroBatch]:
        """The micro-batches of a pass. Raises PassTooLargeError with the numbers, InvalidStepError."""
        self.limits.check(given)
        cost = self.cost(given.blocks)
        room = self.memory.working_bytes
        added, a_position = given.tunables.working_bytes()

        def working_bytes(rows: int, longest: int) -> int:
            return cost.working_bytes(rows, longest) + added + a_position * rows * longest

        def fits(rows: int, longest: int) -> bool:
            small = rows == 1 or rows * longest <= MICRO_POSITIONS
            return small and working_bytes(rows, longest) <= room

        micros = cut_rows(given.rows, fits)
        if micros is None:
            longest = max(given.rows)
            raise PassTooLargeError(
                f"a row of {longest} positions takes {working_bytes(1, longest)} bytes to train through blocks"
                f" {given.blocks}; {room} are set aside here: send shorter rows or fewer blocks"
            )
        return micros

    def tape_bytes(self, given: PassInput, micros: Sequence[MicroBatch]) -> tuple[int, int]:
        """The bytes of a tape at least (inputs, and what the client trains) and at most (with all graphs)."""
        cost = self.cost(given.blocks)
        # Each tape has leaves of its own, which may be far larger than the inputs of a short row.
        least = given.tunables.leaves_bytes + sum(cost.inputs_bytes(micro.positions) for micro in micros)
        graphs = sum(block.kept_bytes(len(m.rows), m.longest) for m in micros for block in cost.blocks)
        return least, least + graphs

    def cost(self, blocks: Span) -> SpanCost:
        """The memory that passes over these blocks take."""
        costs = tuple(self._costs[block] for block in range(blocks.start, blocks.end))
        return SpanCost(costs, self.whole.hidden_size * self.whole.dtype.itemsize, self._largest_weight_bytes)

    def forward(self, given: PassInput, micros: list[MicroBatch], tape_bytes: int = 0) -> ForwardWork:
        """A forward pass, which leaves a tape if `tape_bytes` suffice for one."""
        return ForwardWork(self, given, micros, tape_bytes)

    def backward(self, given: PassInput, micros: list[MicroBatch], grad: torch.Tensor) -> BackwardWork:
        """A backward pass from the input: `grad` is the output's gradient, shaped as `given.hidden`."""
        return BackwardWork(self, Tape(given, micros, self.leaves(given)), grad)

    def backward_of(self, tape: Tape, grad: torch.Tensor) -> BackwardWork:
        """A backward pass from a forward's tape, which it uses up."""
        return BackwardWork(self, tape, grad)

    def leaves(self, given: PassInput) -> dict[int, BlockLeaves]:
        """The tensors of each block that get gradients."""
        blocks = range(given.blocks.start, given.blocks.end)
        return {block: BlockLeaves.of(given.tunables, block, self.whole.device) for block in blocks}

    def run_block(
        self, block: int, micro: MicroBatch, hidden: torch.Tensor, leaves: BlockLeaves, adapter: str
    ) -> torch.Tensor:
        """Run one block, `[rows, longest, hidden_size]` to the same shape, in whatever torch mode is on."""
        if adapter and adapter not in self.adapters.names:
            raise InvalidStepError(f"the adapter {adapter!r} is no longer here")
        model = self._part(Span(block, block + 1))
        hidden = with_prompt(hidden, leaves.prompt, micro.rows)
        positions = torch.arange(micro.longest, device=hidden.device).expand(hidden.shape[:2])
        lengths = None
        if model.follows_length:
            # A row's embeddings scale with its own length, not with its neighbours'.
            lengths = torch.tensor(micro.lengths, device=hidden.device)[:, None]
        with self.adapters.under(adapter), with_leaves(model.layers[0], leaves):
            return model.forward(hidden, positions, rope_lengths=lengths)

    def finite(self, values: torch.Tensor, given: PassInput, what: str) -> torch.Tensor:
        """`values` as they are. Raises NonFiniteError, which says of what they are, where one is NaN or infinite."""
        if not values.isfinite().all():
            raise NonFiniteError.of(given.blocks, self.whole.dtype, what)
        return values

    def home(self, gradient: torch.Tensor) -> torch.Tensor:
        """Bring the gradient of a trained tensor to where its values are kept: the CPU, from where it is sent."""
        return gradient.cpu()

    def on_device(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.to(self.whole.device, self.whole.dtype)

    def _probe(self, block: int, count: int) -> int:
        """The bytes that autograd keeps of a block for one row of `count` positions."""
        generator = torch.Generator().manual_seed(0)
        hidden = self.on_device(torch.randn(1, count, self.whole.hidden_size, generator=generator)).requires_grad_()
        micro = MicroBatch((0,), (count,), (0,))
        with torch.enable_grad(), KeptBytes([*self.whole.parameters(), *self.whole.buffers()]) as kept:
            self.run_block(block, micro, hidden, BlockLeaves(), "")
        return kept.total


class ForwardWork(TrainingWork):
    """A forward. Its `output` is `[sum of rows, hidden_size]` on the CPU; `tape` is None if it left none."""

    def __init__(self, runner: PassRunner, given: PassInput, micros: list[MicroBatch], tape_bytes: int) -> None:
        super().__init__()
        self.output: torch.Tensor = torch.empty(0)
        self.tape: Tape | None = None
        self._runner = runner
        self._given = given
        self._micros = micros
        self._tape_bytes = tape_bytes

    def _run(self) -> Generator[None, None, None]:
        runner, given = self._runner, self._given
        least_bytes, _ = runner.tape_bytes(given, self._micros)
        leaves = runner.leaves(given)
        taping = 0 < least_bytes <= self._tape_bytes
        tape = Tape(given, self._micros, leaves, least_bytes) if taping else None
        output = torch.empty(given.hidden.shape, dtype=runner.whole.dtype)
        for micro in self._micros:
            hidden = runner.on_device(micro.gather(given.hidden))
            if tape is None:
                hidden = yield from self._run_plain(micro, hidden, leaves)
            else:
                hidden = yield from _record(runner, tape, micro, hidden, self._tape_bytes - tape.size_bytes)
            micro.scatter(runner.finite(hidden.cpu(), given, ""), output)
        self.output, self.tape = output, tape

    def _run_plain(
        self, micro: MicroBatch, hidden: torch.Tensor, leaves: Mapping[int, BlockLeaves]
    ) -> Generator[None, None, torch.Tensor]:
        for block in range(self._given.blocks.start, self._given.blocks.end):
            with torch.inference_mode():
                hidden = self._runner.run_block(block, micro, hidden, leaves[block], self._given.adapter)
            yield
        return hidden


class BackwardWork(TrainingWork):
    """A backward. `grad` is the input's gradient, `gradients` those of the tunables in fp32, all on the CPU."""

    def __init__(self, runner: PassRunner, tape: Tape, grad: torch.Tensor) -> None:
        super().__init__()
        self.grad: torch.Tensor = torch.empty(0)
        self.gradients: dict[tuple[int, str], torch.Tensor] = {}
        self._runner = runner
        self._tape = tape
        self._grad = grad

    def _run(self) -> Generator[None, None, None]:
        runner, tape = self._runner, self._tape
        if self._grad.shape != tape.given.hidden.shape:
            raise InvalidStepError(
                f"the gradient has shape {list(self._grad.shape)}, not {list(tape.given.hidden.shape)}"
            )
        result = torch.empty(self._grad.shape, dtype=runner.whole.dtype)
        sums: dict[tuple[int, str], torch.Tensor] = {}
        recorded, tape.entries = tape.entries, []
        for index, micro in enumerate(tape.micros):
            if recorded:
                entries, recorded[index] = recorded[index], []
            else:
                hidden = runner.on_device(micro.gather(tape.given.hidden))
                yield from _record(runner, tape, micro, hidden, self._spare_bytes(micro))
                entries = tape.entries.pop()
            grad = runner.on_device(micro.gather(self._grad))
            for block in reversed(range(tape.given.blocks.start, tape.given.blocks.end)):
                grad = self._back(block, micro, entries.pop(), grad, sums)
                yield
            micro.scatter(runner.finite(grad.cpu(), tape.given, _GRADIENT), result)
        self.gradients = {
            name: runner.finite(runner.home(total), tape.given, _GRADIENT) for name, total in sums.items()
        }
        self.grad = result

    def _spare_bytes(self, micro: MicroBatch) -> int:
        """The bytes for graphs that the memory of a running pass leaves beside this micro-batch's needs."""
        needed = self._runner.cost(self._tape.given.blocks).working_bytes(len(micro.rows), micro.longest)
        return self._runner.memory.working_bytes - needed

    def _back(
        self,
        block: int,
        micro: MicroBatch,
        entry: _Entry,
        grad: torch.Tensor,
        sums: dict[tuple[int, str], torch.Tensor],
    ) -> torch.Tensor:
        leaves = self._tape.leaves[block]
        output = entry.output
        if output is None:
            with torch.enable_grad():
                output = self._runner.run_block(block, micro, entry.hidden, leaves, self._tape.given.adapter)
        named = leaves.named()
        # An expert to which no position was sent has gradients of zero.
        wanted = [entry.hidden, *named.values()]
        first, *others = torch.autograd.grad(output, wanted, grad, allow_unused=True, materialize_grads=True)
        for name, found in zip(named, others, strict=True):
            key = block, name
            sums[key] = sums[key] + found if key in sums else found
        return first


def _record(
    runner: PassRunner, tape: Tape, micro: MicroBatch, hidden: torch.Tensor, graph_bytes: int
) -> Generator[None, None, torch.Tensor]:
    """Run a micro-batch forward and put it on the tape, with graphs of at most `graph_bytes`."""
    cost = runner.cost(tape.given.blocks)
    entries: list[_Entry] = []
    for block, block_cost in zip(range(tape.given.blocks.start, tape.given.blocks.end), cost.blocks, strict=True):
        hidden = hidden.detach().requires_grad_()
        size_bytes = block_cost.kept_bytes(len(micro.rows), micro.longest)
        keeps = size_bytes <= graph_bytes
        with torch.set_grad_enabled(keeps):
            output = runner.run_block(block, micro, hidden, tape.leaves[block], tape.given.adapter)
        entries.append(_Entry(hidden, output if keeps else None))
        if keeps:
            graph_bytes -= size_bytes
            tape.size_bytes += size_bytes
        hidden = output
        yield
    tape.entries.append(entries)
    return hidden.detach()
