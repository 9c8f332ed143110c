"""A forward pass that a daemon runs, and the backward that may follow. Each pass has a websocket of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import trio

from peerd.client.training.trained import LORA_A, LORA_B, Gradients, Trained
from peerd.compute.adapters.lora import PREFIX_K, PREFIX_V, PROMPT
from peerd.local.channel import Channel, open_channel, tensors_of
from peerd.local.messages import GradientsOutput, LocalBackward, LocalForward, LocalOpen, LocalParameter, SessionOpened
from peerd.protocol.errors import InvalidRequest, PeerdError, RemoteProtocolError
from peerd.protocol.messages.session import Output
from peerd.protocol.span import Span

_FORWARD, _BACKWARD = 1, 2


@dataclass(frozen=True, slots=True, eq=False)
class PassRequest:
    """The input of a forward: packed rows `[sum of rows, width]` of these lengths, and what is trained beside them."""

    hidden: torch.Tensor
    rows: tuple[int, ...]
    blocks: Span
    trained: Trained
    keep: bool


class DaemonPass:
    """A forward that the daemon ran. `output` is `[sum of rows, width]`; `backward` may be called once."""

    output: torch.Tensor

    def __init__(self, path: Path, wanted: LocalOpen, asked: PassRequest) -> None:
        self._path = path
        self._wanted = wanted
        self._asked = asked
        self._channel: Channel | None = None
        self._left = trio.Event()

    def __repr__(self) -> str:
        return f"<DaemonPass {self._path} {self._asked.blocks} rows={self._asked.rows}>"

    def close(self) -> None:
        """End the pass, so that the daemon and its peers forget it."""
        self._left.set()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the forward, and keep its websocket open for the backward. Raises the daemon's errors about the
        forward.
        """
        try:
            async with open_channel(self._path) as channel:
                await self._forward(channel)
                self._channel = channel
                task_status.started()
                if self._asked.keep:
                    await self._left.wait()
        except PeerdError:
            # If the websocket breaks later, the backward raises the error.
            if self._channel is None:
                raise
        finally:
            self._left.set()

    async def _forward(self, channel: Channel) -> None:
        asked = self._asked
        # Prompts follow with the rows.
        tensors = asked.trained.parameters(asked.blocks, ())
        await channel.open(self._wanted, {key: tensor for key, tensor in tensors.items() if key[1] != PROMPT})
        await channel.receive(SessionOpened)
        sent = {"tensor": asked.hidden}
        if asked.trained.prompts is not None:
            sent["prompts"] = asked.trained.prompts.detach().float()
        await channel.send(LocalForward(_FORWARD, asked.rows, {}, keep=asked.keep), **sent)
        reply, body = await channel.receive(Output)
        if reply.tensor is None:
            raise RemoteProtocolError("the daemon answered a forward without its tensor")
        [self.output] = tensors_of(body, [reply.tensor])

    async def backward(self, grad_output: torch.Tensor) -> Gradients:
        """Return the gradients for `grad_output`, which has the shape of `output`, and close the pass. Raises as
        `Pass.backward`.
        """
        if self._left.is_set() or self._channel is None:
            raise InvalidRequest("this pass was closed, or has had its backward: run a forward again")
        try:
            await self._channel.send(LocalBackward(_BACKWARD, _FORWARD, {}), tensor=grad_output)
            reply, body = await self._channel.receive(GradientsOutput)
            headers = [reply.tensor] if reply.prompts is None else [reply.tensor, reply.prompts]
            hidden, *prompts = tensors_of(body, headers)
            found = await _parameters(self._channel, reply.parameters)
        finally:
            self.close()
        trained = self._asked.trained
        lora = {
            (block, name): (found[block, name + LORA_A], found[block, name + LORA_B] * trained.scaling)
            for block, name in trained.lora
        }
        prefixes = {block: (found[block, PREFIX_K], found[block, PREFIX_V]) for block in trained.prefixes}
        return Gradients(hidden, prompts[0] if prompts else None, lora, prefixes)


async def _parameters(channel: Channel, count: int) -> dict[tuple[int, str], torch.Tensor]:
    """The gradients that follow, by block and name."""
    found: dict[tuple[int, str], torch.Tensor] = {}
    for _ in range(count):
        parameter, body = await channel.receive(LocalParameter)
        [found[parameter.block, parameter.name]] = tensors_of(body, [parameter.tensor])
    return found
