"""A program's own LoRA matrices, which follow its first message, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio

from peerd.api.tensors.bodies import decoded, header_of
from peerd.client.training.trained import LORA_A, LORA_B, Gradients, LoraPairs
from peerd.compute.adapters.lora import LoraAdapter, LoraPair
from peerd.compute.errors import AdapterError
from peerd.local.messages import Parameter, message_bytes, read_parameter
from peerd.protocol.encoding.tensors import encode_tensor
from peerd.protocol.encoding.wire import RawMessage
from peerd.protocol.errors import InvalidRequest

if TYPE_CHECKING:
    import torch


async def read_pairs(receive: trio.MemoryReceiveChannel[RawMessage], count: int) -> LoraPairs:
    """The matrices of the next `count` messages, as pairs. Raises InvalidRequest, RemoteProtocolError."""
    found: dict[tuple[int, str], torch.Tensor] = {}
    for _ in range(count):
        raw = await receive.receive()
        said = read_parameter(raw)
        found[said.block, said.name] = decoded(header_of(said.tensor), raw.body)
    pairs: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}
    for block, name in found:
        module = name.removesuffix(LORA_A).removesuffix(LORA_B)
        try:
            pairs[block, module] = found[block, module + LORA_A], found[block, module + LORA_B]
        except KeyError:
            raise InvalidRequest(f"block {block}: {name} is one of a pair {module}{LORA_A} and {LORA_B}") from None
    return pairs


def as_adapter(pairs: LoraPairs) -> LoraAdapter | None:
    """The pairs as an adapter of the program's own; None where there are none. Raises InvalidRequest."""
    if not pairs:
        return None
    try:
        return LoraAdapter({key: LoraPair(a, b, 1.0) for key, (a, b) in pairs.items()})
    except AdapterError as error:
        raise InvalidRequest(str(error)) from None


def gradient_messages(gradients: Gradients) -> Iterator[bytes]:
    """A websocket message for each matrix's gradient."""
    for (block, module), pair in gradients.lora.items():
        for suffix, gradient in zip((LORA_A, LORA_B), pair, strict=True):
            header, body = encode_tensor(gradient)
            yield message_bytes(Parameter(block, module + suffix, header.to_fields()), body)
