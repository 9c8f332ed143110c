"""A client's training pass: a forward through the swarm whose backward can follow.

`lanes.py` keeps the lanes and handles their failures. Micro-batches go through the hops one after the other, several at
a time, so that all hops work at once. The client keeps every hop's input: what fails is computed again from there, by
the peers that serve those blocks then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from peerd.client.finding.served_by import ServedBy
from peerd.client.training.lane import TrainingLane
from peerd.client.training.lanes import BACKWARD, FORWARD, TrainingChain
from peerd.client.training.trained import LORA_A, LORA_B, Gradients, Trained
from peerd.compute.adapters.lora import PREFIX_K, PREFIX_V, PROMPT
from peerd.protocol.errors import BadResult, InvalidRequest, PeerdError
from peerd.protocol.span import Span
from peerd.trio_tools import at_once


@dataclass(frozen=True, slots=True, eq=False)
class _Leg:
    """A micro-batch's way through one hop: its input there, and the number of the tape that the hop kept."""

    lane: TrainingLane
    hidden: torch.Tensor
    kept: int | None

    @property
    def span(self) -> Span:
        return self.lane.hop.span


class MicroBatchRun:
    """Some rows of a pass on their way through `chain`, and back."""

    def __init__(self, chain: TrainingChain, numbers: Sequence[int], lengths: Sequence[int], offset: int) -> None:
        self.chain = chain
        self.numbers = tuple(numbers)
        self.rows = tuple(lengths)
        self.part = slice(offset, offset + sum(lengths))
        self._legs: list[_Leg] = []

    async def forward(self, hidden: torch.Tensor, *, keep: bool) -> torch.Tensor:
        """Run `[positions, width]` through the chain. Raises NoChain, Overloaded, CallerError."""
        output, legs = await self._run(self.chain.blocks, hidden, keep=keep)
        self._legs = legs if keep else []
        return output

    async def backward(self, grad: torch.Tensor) -> tuple[torch.Tensor, dict[tuple[int, str], torch.Tensor]]:
        """The gradients of the input and of the parameters, given the output's gradient. Raises as `forward`."""
        legs, self._legs = self._legs, []
        gradients: dict[tuple[int, str], torch.Tensor] = {}
        while legs:
            leg = legs.pop()
            try:
                answer = await leg.lane.backward(self.rows, leg.hidden, leg.kept, grad)
            except PeerdError as error:
                await self.chain.failed(leg.lane, error, BACKWARD)
                # Other peers serve these blocks now, in one hop or more: run their forward again, and then go back
                # through them.
                legs.extend((await self._run(leg.span, leg.hidden, keep=True))[1])
                continue
            self.chain.answered(leg.lane, BACKWARD)
            grad = answer.grad
            gradients |= answer.gradients
        return grad, gradients

    async def _run(self, span: Span, hidden: torch.Tensor, *, keep: bool) -> tuple[torch.Tensor, list[_Leg]]:
        legs: list[_Leg] = []
        block = span.start
        while block < span.end:
            lane = await self.chain.lane(block)
            try:
                answer = await lane.forward(self.rows, hidden, keep=keep)
            except PeerdError as error:
                await self.chain.failed(lane, error, FORWARD)
                continue
            self.chain.answered(lane, FORWARD)
            legs.append(_Leg(lane, hidden, answer.kept))
            hidden = answer.output
            block = lane.hop.span.end
        return hidden, legs


class Pass:
    """A forward that was run; made by `ServedBlocks.forward`.

    `output` has the input's shape. `backward` may be called once. Close a pass that gets no backward: its hops keep
    memory for it, for up to five minutes. It is also a context manager.
    """

    def __init__(self, output: torch.Tensor, micros: Sequence[MicroBatchRun], blocks: Span, trained: Trained) -> None:
        self.output = output
        self._micros = micros
        self._blocks = blocks
        self._trained = trained
        self._spent = False

    def __repr__(self) -> str:
        return f"<Pass {self._blocks} {list(self.output.shape)}>"

    @property
    def chain(self) -> tuple[ServedBy, ...]:
        """Which peers serve which blocks of the first row now."""
        return self._micros[0].chain.served_by

    @property
    def chains(self) -> tuple[tuple[ServedBy, ...], ...]:
        """The chains over which the rows went, as `chain`: several if peers hold whole copies of a chain."""
        return tuple(chain.served_by for chain in self._chains)

    @property
    def failovers(self) -> int:
        """How often a hop was replaced, in the forward and in the backward."""
        return sum(chain.failovers for chain in self._chains)

    async def backward(self, grad_output: torch.Tensor) -> Gradients:
        """The gradients, given `grad_output`, which has the shape of `output`. The pass is closed afterwards.

        Raises InvalidRequest, NoChain, Overloaded; BadResult if gradients overflow.
        """
        if self._spent:
            raise InvalidRequest("this pass was closed, or has had its backward: run a forward again")
        if grad_output.shape != self.output.shape:
            raise InvalidRequest(
                f"a gradient of shape {list(grad_output.shape)} for an output of {list(self.output.shape)}"
            )
        if not grad_output.isfinite().all():
            raise InvalidRequest("the gradient has values that are not finite")
        self._spent = True
        packed, exponent = _near_one(grad_output.detach().reshape(-1, grad_output.shape[-1]))
        try:
            parts = await at_once([partial(micro.backward, packed[micro.part]) for micro in self._micros])
        finally:
            self.close()
        found = [each for _, each in parts]
        hidden = torch.cat([grad.float() for grad, _ in parts]).view(self.output.shape)
        return _scaled(Gradients(hidden, self._prompts(found), self._lora(found), self._prefixes(found)), exponent)

    def close(self) -> None:
        """Let the hops free what they keep for the pass."""
        self._spent = True
        for chain in self._chains:
            chain.close()

    def __enter__(self) -> Pass:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _chains(self) -> list[TrainingChain]:
        return list(dict.fromkeys(micro.chain for micro in self._micros))

    def _prompts(self, found: Sequence[Mapping[tuple[int, str], torch.Tensor]]) -> torch.Tensor | None:
        prompts = self._trained.prompts
        if prompts is None:
            return None
        total = torch.zeros(prompts.shape)
        for micro, gradients in zip(self._micros, found, strict=True):
            rows = list(micro.numbers) if self._trained.has_row_prompts else [0]
            for index in range(len(self._blocks)):
                total[index, rows] += gradients[self._blocks.start + index, PROMPT]
        return total

    def _lora(
        self, found: Sequence[Mapping[tuple[int, str], torch.Tensor]]
    ) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
        scaling = self._trained.scaling
        return {
            (block, module): (_total(found, block, module + LORA_A), _total(found, block, module + LORA_B) * scaling)
            for block, module in self._trained.lora
        }

    def _prefixes(
        self, found: Sequence[Mapping[tuple[int, str], torch.Tensor]]
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        return {
            block: (_total(found, block, PREFIX_K), _total(found, block, PREFIX_V)) for block in self._trained.prefixes
        }


def _total(found: Sequence[Mapping[tuple[int, str], torch.Tensor]], block: int, name: str) -> torch.Tensor:
    """The sum of the micro-batches' gradients of one tensor."""
    return torch.stack([gradients[block, name] for gradients in found]).sum(0)


def _near_one(grad: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A gradient scaled by a power of two so that its largest value is between a half and one, and that power's
    exponent.

    Servers may compute in float16, which ends at 65504 and loses values below 6e-8. Gradients are linear, and powers of
    two are exact.
    """
    largest = grad.abs().amax() if grad.numel() else torch.zeros(())
    exponent = int(torch.frexp(largest.double())[1])
    return _times_power(grad, -exponent), exponent


def _times_power(values: torch.Tensor, exponent: int) -> torch.Tensor:
    """`values` times two to the `exponent`, in two steps: in one step the factor could exceed the dtype's range."""
    half = exponent // 2
    return values * 2.0**half * 2.0 ** (exponent - half)


def _scaled(gradients: Gradients, exponent: int) -> Gradients:
    """All gradients times two to the `exponent`. Raises BadResult if one is then too large for float32."""
    scaled = Gradients(
        _times_power(gradients.hidden, exponent),
        None if gradients.prompts is None else _times_power(gradients.prompts, exponent),
        {key: (_times_power(a, exponent), _times_power(b, exponent)) for key, (a, b) in gradients.lora.items()},
        {key: (_times_power(k, exponent), _times_power(v, exponent)) for key, (k, v) in gradients.prefixes.items()},
    )
    prompts = [] if scaled.prompts is None else [scaled.prompts]
    matrices = (matrix for pair in (*scaled.lora.values(), *scaled.prefixes.values()) for matrix in pair)
    if not all(values.isfinite().all() for values in (scaled.hidden, *prompts, *matrices)):
        raise BadResult("a gradient is larger than float32 can hold: scale the loss down")
    return scaled
