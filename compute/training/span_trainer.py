"""Trains a copy of a span's own weights: gradients add up over backward passes, and an optimizer takes steps.

A pass is the same as one beside frozen weights, and also takes turns of one block, so that inference waits no longer.
All of it belongs to the device thread, except that `tensors` and `state` may be read while no work runs.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import nn

from peerd.compute.adapters.span_adapters import SpanAdapters
from peerd.compute.errors import InvalidStepError, NonFiniteError
from peerd.compute.model.span_model import SpanModel, part_of
from peerd.compute.training.memory import PassMemory
from peerd.compute.training.micro_batches import MicroBatch
from peerd.compute.training.pass_input import PassInput
from peerd.compute.training.passes import BackwardWork, PassRunner, Tape, TrainingWork
from peerd.compute.training.tunables import BlockLeaves
from peerd.protocol.span import Span

Optimizer = Literal["adamw", "sgd"]
# Copies of the weights in fp32 that training needs: the weights, their gradients, and the optimizer's moments.
COPIES: Mapping[str, int] = {"adamw": 4, "sgd": 2}


class SpanTrainer:
    """The weights of `model`, in training. `model` is loaded in fp32, and belongs to the trainer.

    optimizer: torch's AdamW with its defaults, or SGD without momentum; `decay` is its weight decay.
    """

    def __init__(self, model: SpanModel, optimizer: Optimizer, decay: float, memory: PassMemory) -> None:
        #: How many steps the weights are away from those that were published.
        self.step = 0
        self.model = model
        self.optimizer: Optimizer = optimizer
        self.passes = _WeightsRunner(model, memory)
        self._optimizers = {block: _made(optimizer, layer, decay) for block, layer in self._blocks()}
        self._gradients: dict[tuple[int, str], torch.Tensor] = {}

    def __repr__(self) -> str:
        return f"<SpanTrainer {self.model.span} {self.optimizer} step={self.step}>"

    def backward(self, tape: Tape, grad: torch.Tensor) -> BackwardWork:
        """A backward pass from a forward's tape. Once it is complete, its gradients are added to the others."""
        return _WeightsBackward(self, tape, grad)

    def update(self, rate: float, clip: float = 0.0) -> Update:
        """One step of the optimizer with the gradients since the last one. `clip`: the largest norm; 0 for any."""
        return Update(self, rate, clip)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The blocks' tensors in fp32, by their names in the decoder (`layers.7.mlp.down_proj.weight`)."""
        name = self.model.family.layers
        return {
            f"{name}.{block}.{key}": tensor.detach()
            for block, layer in self._blocks()
            for key, tensor in layer.state_dict().items()
        }

    def state(self) -> dict[str, torch.Tensor]:
        """The optimizer's tensors, by block, parameter and name."""
        return {
            f"{block}/{key}/{name}": value
            for block, layer in self._blocks()
            for key, parameter in layer.named_parameters()
            for name, value in self._optimizers[block].state.get(parameter, {}).items()
            if isinstance(value, torch.Tensor)
        }

    def restore(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """Continue from what `tensors` and `state` once returned. Raises KeyError if something is missing."""
        own = self.tensors()
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        parameters = {
            f"{block}/{key}": (block, each) for block, layer in self._blocks() for key, each in layer.named_parameters()
        }
        for name, value in state.items():
            where, _, key = name.rpartition("/")
            block, parameter = parameters[where]
            # AdamW counts its steps on the CPU.
            value = value if value.dim() == 0 else value.to(self.model.device)
            self._optimizers[block].state[parameter][key] = value.clone()
        self.step = step

    def add(self, gradients: Mapping[tuple[int, str], torch.Tensor]) -> None:
        """Add the gradients of one backward pass."""
        for key, gradient in gradients.items():
            self._gradients[key] = self._gradients[key] + gradient if key in self._gradients else gradient

    def apply(self, rate: float, clip: float) -> Generator[None, None, float]:
        """Take a step, one block at a time; returns the norm of all gradients."""
        gradients, self._gradients = self._gradients, {}
        if not gradients:
            raise InvalidStepError("no gradients since the last step: run a backward first")
        norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
        if not torch.tensor(norm).isfinite():
            raise NonFiniteError.of(self.model.span, torch.float32, " as a sum of gradients")
        scale = clip / norm if 0 < clip < norm else 1.0
        for block, layer in self._blocks():
            for name, parameter in layer.named_parameters():
                gradient = gradients.pop((block, name), None)
                parameter.grad = None if gradient is None else gradient * scale
            optimizer = self._optimizers[block]
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            yield
        self.step += 1
        return norm

    def _blocks(self) -> Iterator[tuple[int, nn.Module]]:
        return zip(range(self.model.span.start, self.model.span.end), self.model.layers, strict=True)


class Update(TrainingWork):
    """A step of the optimizer; `norm` is that of the gradients before clipping. Raises InvalidStepError,
    NonFiniteError.
    """

    def __init__(self, trainer: SpanTrainer, rate: float, clip: float) -> None:
        super().__init__()
        self.norm = 0.0
        self._steps = partial(trainer.apply, rate, clip)

    def _run(self) -> Generator[None, None, None]:
        self.norm = yield from self._steps()


def _made(optimizer: Optimizer, layer: nn.Module, decay: float) -> torch.optim.Optimizer:
    parameters = [parameter.requires_grad_() for parameter in layer.parameters()]
    # The rate comes with each step.
    if optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=0.0, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=decay)


@dataclass(slots=True, eq=False)
class _Weights(BlockLeaves):
    """A block's own parameters, as leaves beside a client's."""

    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, torch.Tensor]:
        return self.weights


class _WeightsRunner(PassRunner):
    """Runs passes whose gradients are those of the weights, and stay on their device."""

    def __init__(self, model: SpanModel, memory: PassMemory) -> None:
        parts: dict[Span, SpanModel] = {}

        def part(blocks: Span) -> SpanModel:
            if blocks not in parts:
                parts[blocks] = part_of(model, blocks)
            return parts[blocks]

        super().__init__(model, part, SpanAdapters(model), memory)

    def leaves(self, given: PassInput) -> dict[int, BlockLeaves]:
        span = self.whole.span
        blocks = range(given.blocks.start, given.blocks.end)
        return {
            block: _Weights(weights=dict(self.whole.layers[block - span.start].named_parameters())) for block in blocks
        }

    def home(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class _WeightsBackward(BackwardWork):
    def __init__(self, trainer: SpanTrainer, tape: Tape, grad: torch.Tensor) -> None:
        super().__init__(trainer.passes, tape, grad)
        self._trainer = trainer

    def _run(self) -> Generator[None, None, None]:
        # Nothing is added unless the whole pass is finite.
        yield from super()._run()
        self._trainer.add(self.gradients)
        self.gradients = {}


def whole_pass(trainer: SpanTrainer, rows: tuple[int, ...], hidden: torch.Tensor) -> tuple[PassInput, list[MicroBatch]]:
    """Rows for the whole span, and their micro-batches. Raises PassTooLargeError, InvalidStepError."""
    given = PassInput(trainer.model.span, rows, hidden)
    return given, trainer.passes.plan(given)
